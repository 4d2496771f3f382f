"""Evaluation of models on held-out records: metrics, judges, reward-model reports, and their pages."""
