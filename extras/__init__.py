"""Everything beyond the paper: other methods, another backbone, tools. TGLoRA runs without it."""
