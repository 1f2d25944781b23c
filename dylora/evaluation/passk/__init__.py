"""pass@k: suites, samples, verdicts and published scores."""
