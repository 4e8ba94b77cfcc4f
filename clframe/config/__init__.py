"""Configs: schema, files and command-line overrides."""
