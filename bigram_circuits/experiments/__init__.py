"""Questions that take several runs: faithfulness by size, attempts to refute a finding, comparisons."""
