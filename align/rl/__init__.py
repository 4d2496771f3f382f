"""Reinforcement learning on one base: maths on plain tensors, rewards, rollouts, scoring passes and their state."""
