"""Many runs, one question: a path of sizes, attempts to refute a finding, a comparison."""
