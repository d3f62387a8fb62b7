"""What is measured, and the pages of docs/ with the figures."""
