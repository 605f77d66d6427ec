"""What a budget buys, which options are tried, and how a learning rate and a weight are chosen on dev rows."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..methods import METHODS, get_method, method_names, strategy_name
from ..schema import read_yaml
from ..tuner import JumpLoraConfig


@dataclass(frozen=True)
class Budget:
    """The cost of one table. A run of a method trains `steps` steps of `batch` examples a task.

    max_length: tokens of a text; longer ones are cut (prompt and answer are not counted). test_rows: examples a task of
    the test split that are evaluated.
    eval_tasks: "seen" evaluates the tasks trained so far, "all" later ones too (and before any training).
    tune_steps: steps per task of a tuning run, which trains the first two tasks and evaluates both on `dev_rows`
    examples each, held out of their training rows. 0: nothing is tuned, every method takes the first rate and its own
    defaults.
    rates: learning rates that are tried; weights: how many values of a method's own option
    ([`tuned_option`]) are.
    """

    steps: int
    batch: int
    max_length: int
    test_rows: int
    eval_tasks: Literal["all", "seen"]
    tune_steps: int
    dev_rows: int
    rates: tuple[float, ...]
    weights: int


BUDGETS = {
    "tiny": Budget(10, 4, 64, 8, "seen", 6, 8, (1e-3,), 1),  # to see that everything works
    "untuned": Budget(30, 16, 32, 50, "seen", 0, 0, (1e-3,), 0),  # a real language model on a CPU
    "untuned-gpu": Budget(60, 32, 128, 200, "seen", 0, 0, (1e-3,), 0),  # and on a GPU
    "untuned-gpu-256": Budget(60, 32, 256, 200, "seen", 0, 0, (1e-3,), 0),  # with whole texts
    # "small" with nothing tuned, at the rate that it chose for most methods that remember
    "untuned-small": Budget(50, 16, 32, 200, "seen", 0, 0, (3e-3,), 0),
    "small": Budget(50, 16, 32, 200, "seen", 25, 100, (1e-3, 3e-3), 3),
    # "small" with the rates that fair comparisons of LoRA's variants need
    "small-rates": Budget(50, 16, 32, 200, "seen", 25, 100, (1e-3, 3e-3, 3e-4, 1e-2), 2),
    "long": Budget(300, 16, 32, 200, "seen", 25, 100, (1e-3, 3e-3), 3),  # tuned as small is
    "full": Budget(60, 32, 128, 500, "all", 60, 300, (1e-3, 3e-4, 3e-3), 5),
}

# Fields of ContinualTrainingArguments that a variant may set; the others are the protocol's.
TRAINING = ("allora_eta", "factor_optimizer", "gate_learning_rate", "loraplus_lr_ratio", "optim", "riemannian_reg",
            "weight_decay")  # fmt: skip

# Times the default of a penalty's `weight`, in the order in which they are tried.
FACTORS = (1.0, 10.0, 0.1, 100.0, 0.01)


def tuned_option(method: str) -> tuple[str, tuple[float, ...]] | None:
    """(option of a strategy such as "ella.weight", values) that is tuned for a method; None if it has nothing to tune.

    The first strategy decides that says what to tune (`Strategy.tuning`) or has a `weight` above 0.
    """
    for make in get_method(method).strategies:
        name, strategy = strategy_name(make), make()
        if strategy.tuning is not None:
            return f"{name}.{strategy.tuning[0]}", strategy.tuning[1]
        if weight := getattr(strategy, "weight", None):
            return f"{name}.weight", tuple(weight * factor for factor in FACTORS)
    return None


def grid(method: str, budget: Budget) -> tuple[tuple[float, ...], tuple[float | None, ...]]:
    """(learning rates, weights) that a budget tries for a method; (None,) for a method without a weight."""
    option = tuned_option(method)
    return budget.rates, option[1][: budget.weights] if option else (None,)


def next_point(method: str, budget: Budget, done: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The next {"rate", "weight"} to try given the finished points ("rate", "weight", "score"), or None.

    Coordinate search: all rates with the first weight, then the other weights with the best rate. A point whose score
    is None (it failed) is never the best.
    """
    if not budget.tune_steps:
        return None
    rates, weights = grid(method, budget)
    tried = {(point["rate"], point["weight"]) for point in done}
    for rate in rates:
        if (rate, weights[0]) not in tried:
            return {"rate": rate, "weight": weights[0]}
    chosen = best_point(done)
    for weight in weights[1:] if chosen else ():
        if (chosen["rate"], weight) not in tried:
            return {"rate": chosen["rate"], "weight": weight}
    return None


def untuned_point(budget: Budget) -> dict[str, Any]:
    """The point of a budget that tunes nothing."""
    return {"rate": budget.rates[0], "weight": None}


def best_point(done: list[dict[str, Any]]) -> dict[str, Any]:
    """The point of the highest score, the earlier one of equals; {} if all failed."""
    return max((p for p in done if p["score"] is not None), key=lambda p: p["score"], default={})


def chosen_methods(names: list[str], variants: dict[str, dict[str, Any]] | None = None) -> list[str]:
    """The methods and variants asked for, `all` for every one of both. Raises ValueError for an unknown name."""
    if names == ["all"]:
        return [*METHODS, *(variants or {})]
    known = [*method_names(), *(variants or {})]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; known: all, {', '.join(known)}")
    return list(dict.fromkeys(names))


def read_variants(path: Path) -> dict[str, dict[str, Any]]:
    """Methods with other options, for ablations: a YAML file of `name: {method: ..., and what follows}`.

    method: the method it is a variant of, whose option is tuned. adapter: fields of [`JumpLoraConfig`]. strategy: a
    list of NAME.OPTION=VALUE, as recipes take them. training: arguments of the optimizer ([`TRAINING`]). rates: the
    learning rates to try in place of the budget's, for an optimizer whose steps have another size. tuned_as: a method
    or variant whose rate and weight it takes instead of being tuned.
    Returns {name: {"method", "adapter", "strategy"[, "training"][, "rates"][, "tuned_as"]}}.

    Raises:
        ValueError: the file is not of this form, or names something that does not exist; the message says which.
    """
    content, _ = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: write NAME: {{method: ..., adapter: {{...}}, strategy: [...]}}")
    variants, options = {}, {f.name for f in fields(JumpLoraConfig)}
    for name, given in content.items():
        where = f"{path}, variant {name!r}"
        keys = {"method", "adapter", "strategy", "training", "rates", "tuned_as"}
        if not isinstance(given, dict) or given.keys() - keys or "method" not in given:
            raise ValueError(
                f"{where}: it has a method and may have adapter, strategy, training, rates and tuned_as; got {given!r}"
            )
        if not isinstance(name, str) or name in method_names() or not name.replace("-", "").replace(".", "").isalnum():
            raise ValueError(f"{where}: the name must be new, of letters, digits, dots and hyphens")
        variant = {
            "method": given["method"],
            "adapter": given.get("adapter", {}),
            "strategy": given.get("strategy", []),
            **{key: given[key] for key in ("training", "rates", "tuned_as") if key in given},
        }
        try:
            get_method(variant["method"]).make_strategies(variant["strategy"] or None)
            if unknown := variant["adapter"].keys() - options:
                raise ValueError(f"the adapter has no option {sorted(unknown)[0]!r}")
            if unknown := set(variant.get("training", {})) - set(TRAINING):
                raise ValueError(f"training may have {', '.join(TRAINING)}; got {sorted(unknown)[0]!r}")
            get_method(variant["method"]).adapter_config(variant["adapter"])
            if not all(isinstance(rate, float) and rate > 0 for rate in variant.get("rates", [1.0]) or [0]):
                raise ValueError(f"rates is a list of learning rates such as 0.001, got {variant['rates']!r}")
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        variants[name] = variant
    for name, variant in variants.items():
        other = variant.get("tuned_as")
        if other is not None and (other not in {*method_names(), *variants} or "tuned_as" in variants.get(other, {})):
            raise ValueError(f"{path}, variant {name!r}: tuned_as names {other!r}, which is nothing that is tuned")
    return variants
