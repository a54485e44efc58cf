"""Replicas that meet now and then: what each sends of a round, and how it is applied."""
