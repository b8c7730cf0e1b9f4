"""What the second pass sees again, and what it leaves as it was."""
