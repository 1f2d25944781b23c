"""Training: data, optimizer, the loop, what it logs and how it resumes."""
