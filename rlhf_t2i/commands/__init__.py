"""The subcommands of the CLI; modules here import torch only inside functions, so that --help stays fast."""
