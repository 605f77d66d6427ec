"""The commands of `hf-jumplora`. A module has `add_arguments(parser)` and `run(args)`; `cli.COMMANDS` lists it."""
