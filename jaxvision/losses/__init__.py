"""Losses that two or more methods use; each method's own loss lies in its folder."""
