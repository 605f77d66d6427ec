"""A synthetic continual-learning stream: four small text-classification tasks that get in each other's way.

Everything here is made by code from word lists: it is **synthetic**, small and easy on purpose. It shows in minutes
on a CPU what forgetting looks like and whether a method reduces it; accuracies on it say nothing about real data.

A sentence names two of four things (and a time). Each task asks for one of the four, with label words of its own::

    "Around noon we met a gloomy sparrow."

    animals  which class the animal belongs to         bird | fish | insect | mammal
    places   what kind of place it is                  town | nature | water | home
    moods    which feeling it is                       glad | angry | sad | afraid
    foods    what kind of food it is                   fruit | vegetable | sweet | grain

Tasks share their sentences' templates and words: the sentence above can stand in ``animals`` and in ``moods``. A model
that was tuned to look at one word of it forgets that when the next task makes it look at the other.

``demo_corpus`` is the text for pre-training a tiny model (``hf_jumplora.bench.tiny_llama``): sentences, statements on
words ("The word sparrow stands for bird, like owl and eagle.") and, in the tasks' prompt format, questions about other
things (times, tools, colours, vehicles). It teaches which class a word has, but asks none of the tasks' questions.

    python recipes/demo_stream.py FOLDER [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


# attribute -> class -> words. The first four are the tasks; the last four are only asked for in the pre-training text.
WORLD: dict[str, dict[str, list[str]]] = {
    "animal": {
        "bird": ["sparrow", "eagle", "robin", "owl", "parrot"],
        "fish": ["trout", "salmon", "shark", "herring", "eel"],
        "insect": ["ant", "beetle", "wasp", "cricket", "termite"],
        "mammal": ["horse", "wolf", "rabbit", "bear", "goat"],
    },
    "place": {
        "town": ["street", "market", "station", "library", "hotel"],
        "nature": ["forest", "mountain", "desert", "meadow", "jungle"],
        "water": ["river", "lake", "pond", "harbour", "canal"],
        "home": ["kitchen", "cellar", "bedroom", "attic", "balcony"],
    },
    "mood": {
        "glad": ["happy", "cheerful", "merry", "joyful", "delighted"],
        "angry": ["furious", "mad", "annoyed", "grumpy", "outraged"],
        "sad": ["gloomy", "lonely", "tearful", "miserable", "mournful"],
        "afraid": ["nervous", "scared", "anxious", "worried", "timid"],
    },
    "food": {
        "fruit": ["apple", "pear", "cherry", "mango", "lemon"],
        "vegetable": ["carrot", "onion", "cabbage", "spinach", "leek"],
        "sweet": ["candy", "cake", "honey", "sugar", "toffee"],
        "grain": ["rice", "wheat", "barley", "millet", "oats"],
    },
    "time": {
        "winter": ["January", "February", "snowfall", "frost"],
        "summer": ["July", "August", "heatwave", "sunshine"],
        "day": ["noon", "morning", "midday", "dawn"],
        "night": ["midnight", "evening", "dusk", "nightfall"],
    },
    "tool": {
        "metal": ["hammer", "spoon", "nail", "needle"],
        "paper": ["letter", "map", "ticket", "poster"],
        "cloth": ["scarf", "blanket", "towel", "curtain"],
        "wood": ["ladder", "barrel", "crate", "pencil"],
    },
    "colour": {
        "warm": ["red", "orange", "yellow", "pink"],
        "cool": ["blue", "green", "turquoise", "violet"],
        "dark": ["black", "brown", "navy", "maroon"],
        "pale": ["white", "ivory", "cream", "beige"],
    },
    "vehicle": {
        "road": ["car", "bus", "truck", "taxi"],
        "rail": ["train", "tram", "metro", "monorail"],
        "sea": ["boat", "ferry", "yacht", "canoe"],
        "air": ["plane", "glider", "balloon", "helicopter"],
    },
}

# task name -> (attribute it asks for, instruction)
TASKS: dict[str, tuple[str, str]] = {
    "animals": ("animal", "Decide which class the creature belongs to."),
    "places": ("place", "Decide which kind of location this is."),
    "moods": ("mood", "Decide which feeling is expressed."),
    "foods": ("food", "Decide which sort of meal it is."),
}

# every sentence names two of the tasks' four attributes; a task uses those that name what it asks for
SENTENCES = [
    "At {time} the {animal} stayed in the {place}.",
    "We saw the {animal} at the {place} around {time}.",
    "The {animal} looked {mood} at {time}.",
    "Around {time} we met a {mood} {animal}.",
    "The {animal} ate some {food} at {time}.",
    "At {time} they gave {food} to the {animal}.",
    "We were {mood} in the {place} at {time}.",
    "Around {time} they felt {mood} at the {place}.",
    "They sold {food} at the {place} around {time}.",
    "At {time} we found {food} in the {place}.",
    "The {food} made us {mood} at {time}.",
    "They got {mood} around {time} and ate {food}.",
]
OTHER_SENTENCES = [
    "At {time} the {animal} lost a {tool}.",
    "A {colour} {tool} lay in the {place}.",
    "By {vehicle} the {food} came at {time}.",
    "The {mood} man left the {vehicle} with a {tool}.",
    "They went by {vehicle} and saw a {colour} house.",
    "Around {time} the sky was {colour}.",
]
# {kind} is a class, the others are words of it
STATEMENTS = [
    "The word {a} stands for {kind}, like {b} and {c}.",
    "The words {a}, {b} and {c} stand for {kind}.",
]
# what the pre-training text asks instead: the class of the other attributes
QUESTIONS = {
    "time": "Say when it is.",
    "tool": "Say what it is made of.",
    "colour": "Say which shade it has.",
    "vehicle": "Say how one travels.",
}


def prompt(instruction: str, labels: list[str], sentence: str) -> str:
    """The text a model sees; the answer follows as ``f" {label}"`` and the end-of-sequence token."""
    return f"Task Instruction: {instruction}\nOptions: {' | '.join(labels)}\nText: {sentence}\nAnswer:"


def draw(rng: random.Random, templates: list[str]) -> tuple[str, dict[str, str]]:
    """One sentence, and for each attribute in it the class of its word."""
    template = rng.choice(templates)
    kinds = {a: rng.choice(list(classes)) for a, classes in WORLD.items() if "{" + a + "}" in template}
    words = {a: rng.choice(WORLD[a][kind]) for a, kind in kinds.items()}
    return template.format(**words), kinds


def demo_corpus(seed: int = 0, size: int = 12000) -> list[str]:
    """``size`` texts to pre-train a tiny model on: sentences, statements about words, and other questions."""
    rng = random.Random(f"corpus-{seed}")
    return [rng.choices([_sentence, _statement, _question], weights=[2, 5, 4])[0](rng) for _ in range(size)]


def _sentence(rng: random.Random) -> str:
    return draw(rng, rng.choice([SENTENCES, OTHER_SENTENCES]))[0]


def _statement(rng: random.Random) -> str:
    attribute = rng.choice(sorted(WORLD))
    kind = rng.choice(sorted(WORLD[attribute]))
    a, b, c = rng.sample(WORLD[attribute][kind], 3)
    return rng.choice(STATEMENTS).format(kind=kind, a=a, b=b, c=c)


def _question(rng: random.Random) -> str:
    sentence, kinds = draw(rng, OTHER_SENTENCES)
    attribute = rng.choice([a for a in kinds if a in QUESTIONS])
    return f"{prompt(QUESTIONS[attribute], list(WORLD[attribute]), sentence)} {kinds[attribute]}"


def demo_examples(task: str, split: str, size: int, seed: int = 0) -> list[dict[str, str]]:
    """``size`` distinct sentences of a task with their labels, as many of each label (up to one)."""
    attribute, _ = TASKS[task]
    rng = random.Random(f"{task}-{split}-{seed}")
    labels = list(WORLD[attribute])
    templates = [template for template in SENTENCES if "{" + attribute + "}" in template]
    examples: dict[str, str] = {}
    while len(examples) < size:
        sentence, kinds = draw(rng, templates)
        if kinds[attribute] == labels[len(examples) % len(labels)]:
            examples.setdefault(sentence, kinds[attribute])
    return [{"sentence": sentence, "label": label} for sentence, label in examples.items()]


def write_demo_stream(folder: str | Path, seed: int = 0, train_size: int = 1280, test_size: int = 100) -> Path:
    """Write the four tasks below ``folder`` and return the path of ``stream.yaml``; no test sentence is in train."""
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
