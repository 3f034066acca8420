"""Generates pages of docs/reference from the code: `make reference` writes them, and a test keeps them up to date."""
