"""Configs: their schema, their files, and what the command line may change in them."""
