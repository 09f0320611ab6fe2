"""From adapter to a file that runs: merge, convert, quantize, prove equal, choose, bundle."""
