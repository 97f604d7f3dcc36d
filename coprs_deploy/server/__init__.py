"""Answers over HTTP, and a page to ask for them."""
