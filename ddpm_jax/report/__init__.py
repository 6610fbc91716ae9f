"""The one-page report of a workdir, `report.html`: made of what lies there, and of nothing else."""
