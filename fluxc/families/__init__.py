"""Families: pipelines by the models they are composed of, how they read prompts, guidance and schedule; one file each."""
