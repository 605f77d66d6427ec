"""A synthetic continual-learning stream: four small text-classification tasks that get in each other's way.

Everything here is made by code from word lists: it is **synthetic**, small and easy on purpose. It shows in minutes
on a CPU what forgetting looks like and whether a method reduces it; accuracies on it say nothing about real data.

All four tasks read the *same kind of sentence* and ask for something else in it, each with label words of its own::

    In the harbour, the gloomy sparrow ate some honey.

    animals  which class the animal belongs to         bird | fish | insect | mammal
    places   what kind of place it is                  town | nature | water | home
    moods    how the animal feels                      glad | angry | sad | afraid
    foods    what kind of food it is                   fruit | vegetable | sweet | grain

So a model that is tuned on one question learns to look at one word, and tuning it on the next question makes it look
elsewhere. ``demo_corpus`` is the text for pre-training a tiny model from scratch (``tiny_llama.py``): such sentences,
statements about the words ("The sparrow is a bird.") and questions in the same prompt format with *other* questions;
no text in it asks one of the four tasks' questions.

    python recipes/demo_stream.py FOLDER [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

# attribute -> class -> words; the class is what a task asks for
WORLD: dict[str, dict[str, list[str]]] = {
    "animal": {
        "bird": ["sparrow", "eagle", "robin", "owl"],
        "fish": ["trout", "salmon", "shark", "herring"],
        "insect": ["ant", "beetle", "wasp", "cricket"],
        "mammal": ["horse", "wolf", "rabbit", "bear"],
    },
    "place": {
        "town": ["street", "market", "station", "library"],
        "nature": ["forest", "mountain", "desert", "meadow"],
        "water": ["river", "lake", "pond", "harbour"],
        "home": ["kitchen", "cellar", "bedroom", "attic"],
    },
    "mood": {
        "glad": ["happy", "cheerful", "merry", "joyful"],
        "angry": ["furious", "mad", "annoyed", "grumpy"],
        "sad": ["gloomy", "lonely", "tearful", "miserable"],
        "afraid": ["nervous", "scared", "anxious", "worried"],
    },
    "food": {
        "fruit": ["apple", "pear", "cherry", "mango"],
        "vegetable": ["carrot", "onion", "cabbage", "spinach"],
        "sweet": ["candy", "cake", "honey", "sugar"],
        "grain": ["rice", "wheat", "barley", "millet"],
    },
}
# a second property of each word, made up (by its place in the list): what the pre-training text asks for
OTHER_PROPERTY: dict[str, list[str]] = {
    "animal": ["huge", "large", "small", "tiny"],
    "place": ["crowded", "busy", "quiet", "empty"],
    "mood": ["brief", "short", "long", "endless"],
    "food": ["free", "cheap", "dear", "priceless"],
}

# task name -> (attribute it asks for, instruction)
TASKS: dict[str, tuple[str, str]] = {
    "animals": ("animal", "Say which kind of animal it is."),
    "places": ("place", "Say which kind of place it is."),
    "moods": ("mood", "Say which kind of mood it is."),
    "foods": ("food", "Say which kind of food it is."),
}

SENTENCES = [
    "In the {place}, the {mood} {animal} ate some {food}.",
    "The {mood} {animal} found some {food} near the {place}.",
    "Some {food} made the {animal} {mood} at the {place}.",
    "The {animal} was {mood} and took {food} to the {place}.",
    "We saw a {mood} {animal} with {food} by the {place}.",
    "At the {place} there was {food} for the {mood} {animal}.",
]
STATEMENTS = [
    "The word {a} stands for {kind}, like {b} and {c}.",
    "The words {a}, {b} and {c} stand for {kind}.",
]
OTHER_STATEMENTS = [
    "The word {a} goes with {kind}, like {b} and {c}.",
    "The words {a}, {b} and {c} go with {kind}.",
]
OTHER_QUESTIONS = {
    "animal": "Say how big the animal is.",
    "place": "Say how crowded the place is.",
    "mood": "Say how long the mood lasts.",
    "food": "Say what the food costs.",
}


def prompt(instruction: str, labels: list[str], sentence: str) -> str:
    """The text a model sees; the answer follows as ``f" {label}"`` and the end-of-sequence token."""
    return f"Task Instruction: {instruction}\nOptions: {' | '.join(labels)}\nText: {sentence}\nAnswer:"


def other_property(attribute: str, word: str) -> str:
    """The made-up second property of a word."""
    position = next(words.index(word) for words in WORLD[attribute].values() if word in words)
    return OTHER_PROPERTY[attribute][position % len(OTHER_PROPERTY[attribute])]


def draw(rng: random.Random) -> tuple[str, dict[str, str], dict[str, str]]:
    """One sentence, and for each attribute the word in it and the class of the word."""
    kinds = {attribute: rng.choice(list(classes)) for attribute, classes in WORLD.items()}
    words = {attribute: rng.choice(WORLD[attribute][kind]) for attribute, kind in kinds.items()}
    return rng.choice(SENTENCES).format(**words), words, kinds


def demo_corpus(seed: int = 0, size: int = 12000) -> list[str]:
    """``size`` texts to pre-train a tiny model on: sentences, statements about words, and other questions."""
    rng = random.Random(f"corpus-{seed}")
    return [rng.choices([_sentence, _statement, _question], weights=[1, 6, 4])[0](rng) for _ in range(size)]


def _sentence(rng: random.Random) -> str:
    return draw(rng)[0]


def _statement(rng: random.Random) -> str:
    attribute = rng.choice(list(WORLD))
    if rng.random() < 0.5:
        templates, kind = STATEMENTS, rng.choice(list(WORLD[attribute]))
        words = WORLD[attribute][kind]
    else:
        templates, kind = OTHER_STATEMENTS, rng.choice(OTHER_PROPERTY[attribute])
        words = [w for ws in WORLD[attribute].values() for w in ws if other_property(attribute, w) == kind]
    a, b, c = rng.sample(words, 3)
    return rng.choice(templates).format(kind=kind, a=a, b=b, c=c)


def _question(rng: random.Random) -> str:
    sentence, words, _ = draw(rng)
    attribute = rng.choice(list(WORLD))
    answer = other_property(attribute, words[attribute])
    return f"{prompt(OTHER_QUESTIONS[attribute], OTHER_PROPERTY[attribute], sentence)} {answer}"


def demo_examples(task: str, split: str, size: int, seed: int = 0) -> list[dict[str, str]]:
    """``size`` distinct sentences of a task with their labels, as many of each label (up to one)."""
    attribute, _ = TASKS[task]
    rng = random.Random(f"{task}-{split}-{seed}")
    labels = list(WORLD[attribute])
    examples: dict[str, str] = {}
    while len(examples) < size:
        sentence, _, kinds = draw(rng)
        if kinds[attribute] == labels[len(examples) % len(labels)]:
            examples.setdefault(sentence, kinds[attribute])
    return [{"sentence": sentence, "label": label} for sentence, label in examples.items()]


def write_demo_stream(folder: str | Path, seed: int = 0, train_size: int = 1280, test_size: int = 100) -> Path:
    """Write the four tasks below ``folder`` and return the path of ``stream.yaml``."""
    folder = Path(folder)
    lines = ["# synthetic, see demo_stream.py", "name: demo", "tasks:"]
    for task, (attribute, instruction) in TASKS.items():
        directory = folder / task
        directory.mkdir(parents=True, exist_ok=True)
        test = demo_examples(task, "test", test_size, seed)
        seen = {example["sentence"] for example in test}
        train = [e for e in demo_examples(task, "train", train_size + test_size, seed) if e["sentence"] not in seen]
        for name, content in {"train": train[:train_size], "test": test, "labels": list(WORLD[attribute])}.items():
            (directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        lines += [f"  - name: {task}", f"    folder: {task}", f"    instruction: {json.dumps(instruction)}"]
    path = folder / "stream.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the synthetic demo stream.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_demo_stream(arguments.folder, arguments.seed))


if __name__ == "__main__":
    main()
