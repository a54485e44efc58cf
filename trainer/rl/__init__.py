"""Reinforcement learning on a verifiable task: prompts, rewards, and the policy loss."""
