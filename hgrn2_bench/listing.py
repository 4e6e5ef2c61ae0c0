"""What `list` prints. Imports no torch."""

import dataclasses

from hgrn2_bench import registry
from hgrn2_bench.files import DATA, WORD


def print_all() -> None:
    """Suites with their presets, and models."""
    print("suites")
    for name in registry.suites():
        print(f"  {name:<18}{registry.suite_summary(name)}")
        for preset, content in registry.protocol(name).presets.items():
            print(f"    {f'preset={preset}':<20}{content.summary}")
    print("\nmodels")
    for name, model in registry.models().items():
        print(f"  {name:<18}{model.summary}")
    print("\n`list NAME` shows the keys of a suite or the settings of a model")


def print_suite(name: str) -> None:
    """A suite: its presets with every number, and its keys."""
    from hgrn2_bench.plan import sections

    protocol = registry.protocol(name)
    print(f"{name}: {registry.suite_summary(name)}\nprotocol version {protocol.version}, metric {protocol.metric} ({protocol.unit})")
    for preset, content in protocol.presets.items():
        others = "; task=NAME takes any other that the suite knows" * content.open_tasks
        print(f"\npreset={preset}: {content.summary}\n  source: {content.source}\n  tasks: {', '.join(content.tasks)}{others}")
        last = {word.partition("=")[0]: word for word in content.words}  # a preset may take over words and replace some
        print(f"  words: {' '.join(last.values())}")
    print("\nkeys (defaults; presets override them)")
    if protocol.fingerprint is not None:
        print(f"  {WORD}DIR  (the folder of your files; without it {DATA}, else data)")
    for schema in sections(protocol).values():
        for field in dataclasses.fields(schema):
            if field.name in protocol.idle:
                continue
            choices = field.metadata.get("choices")
            print(f"  {field.name}={field.default}" + (f"  ({'|'.join(choices)})" if choices else ""))


def print_model(ref: str) -> None:
    """A model and its settings."""
    from hgrn2_bench.config import written

    model = registry.model(ref)
    print(f"{model.name}: {model.summary}\nversion {model.version}, {model.module}\nsettings")
    for field in dataclasses.fields(model.settings):
        choices = field.metadata.get("choices")
        print(f"  {model.name}.{field.name}={written(field.default)}" + (f"  ({'|'.join(choices)})" if choices else ""))
