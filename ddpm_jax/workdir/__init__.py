"""The folder of a run: its layout, files written whole or not at all, metrics, lock."""
