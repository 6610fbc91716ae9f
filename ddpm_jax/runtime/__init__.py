"""The process: signals, watchdog, the processes of a job, progress, and all tuning for CPUs. Knows no run."""
