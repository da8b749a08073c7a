"""Write a long prompt for the demo from the help texts that come with Python.

Run: `python examples/make_prompt.py build/demo_prompt.txt`.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics


def main() -> None:
    """Join the help topics in the order of their names and keep the first characters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--characters", type=int, default=12_000)
    args = parser.parse_args()

    text = "\n\n".join(topics[name].strip() for name in sorted(topics))[: args.characters]
    text += "\n\nSay in two sentences what the text above explains.\n"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, encoding="utf-8")
    print(f"{args.output}: {len(text):,} characters")


if __name__ == "__main__":
    main()
