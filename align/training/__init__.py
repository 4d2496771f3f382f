"""Runs: the folder, the command line of a stage, TRL's trainers called with our arguments, checkpoints and resume."""
