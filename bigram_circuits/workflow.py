"""What find does."""
