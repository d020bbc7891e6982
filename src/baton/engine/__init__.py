"""Runs a model on one worker; knows no network."""
