"""The site as readers see it, in a real browser."""
