"""The commands of `hf-jumplora`. A module has `add_arguments(parser)` and `run(args)`."""

# command -> its line in --help; only the module of the chosen one is imported
COMMANDS = {
    "train": "train on a stream of tasks, configured by a YAML file",
    "report": "write report.html, a page about one run or several",
    "check": "SHIP or DON'T SHIP: whether a run lost more than the limits allow",
    "eval": "evaluate a stack on the tasks of a stream, or of lm-eval",
    "methods": "the names for --method, and the papers they come from",
    "doctor": "what is installed, and what will not work",
    "estimate": "the memory that training needs, per process",
    "bench": "compare methods on a stream of tasks",
    "inspect": "what a stack contains: tasks, densities, overlaps, sizes",
    "verify": "check every file of a stack against its sha256",
    "diff": "what differs between two stacks",
    "subset": "write a stack with some of the tasks",
    "remove": "write a stack without some of the tasks",
    "reorder": "write a stack in another order, where order does not matter",
    "squeeze": "write a stack whose tasks have a lower rank",
    "recover": "turn a stack of a pruned base into one of the whole base",
    "router": "train the router that picks the tasks for each prompt",
    "merge": "write a plain model with the updates merged in",
    "push": "push the tasks that the Hub lacks: one commit and one tag each",
    "export": "write a LoRA adapter or sparse values for other software",
    "completion": "complete commands and options in bash, zsh or fish",
}
