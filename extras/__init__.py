"""Everything beyond the paper: other methods, another backbone, tools. The core never needs it."""
