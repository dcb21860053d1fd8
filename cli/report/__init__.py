"""What finished runs add up to: one page, its figures and its tables."""
