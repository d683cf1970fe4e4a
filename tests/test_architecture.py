"""The house rules, read off the syntax tree: import order, owners of heavy packages, sizes, documented
options."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlver_dist"
ORDER = (
    "errors files concurrency latency text seeding config dialogue data bundled_models algorithms experience "
    "chat_client simulator ledger tracking "
    "rollout persona_synthesis learner evaluation cluster preflight trainer launch"
).split()
ROOT = set("__init__ launch dialogue errors files concurrency latency text seeding bundled_models".split())
"""What may lie loose in the package: commands, and what everything shares."""
OWNERS = {
    "ray": ["cluster/"],
    "vllm": ["rollout/engine.py", "rollout/chat_engine.py", "rollout/weight_transfer.py"],
    "deepspeed": ["learner/engine.py"],
    "peft": ["learner/lora.py"],
    "httpx": ["chat_client/http.py"],
    "wandb": ["tracking/wandb.py"],
    "hydra": ["launch.py"],
}
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
OLD_WORDS = {
    "CriticLearnerActor",
    "HoldFn",
    "LOOKED_AT",
    "Learned",
    "LearnerActor",
    "PolicyLearnerActor",
    "Built",
    "Parts",
    "_between_states",
    "_way_on",
    "bring_warm_start",
    "causes",
    "hold",
    "lasting_options",
    "load_trunk",
    "prefit_iterations",
    "roomy_folder",
    "share_rows",
    "train_on",
}
"""Identifiers that have given way to the field's words (the glossary in CONTRIBUTING.md)."""
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_RUN_CONFIG_TAKERS = 12
"""Functions that take the whole configuration; the others take the group that they use."""
MAX_ANY_PER_1000_LINES = 4


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _rank(module: str) -> int:
    """Place of a dotted module name below rlver_dist in the import order."""
    return ORDER.index(_part(module))


def _part(module: str) -> str:
    """The entry of `ORDER` that a dotted module name below rlver_dist belongs to."""
    return module.split(".")[0]


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}: relative import; write the whole name"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_imports_only_from_lower_modules(path):
    own = _name(path).removesuffix(".py").replace("/", ".")
    if path.name == "__init__.py":
        return
    for module in _imports(path):
        if module.startswith("rlver_dist."):
            other = module.removeprefix("rlver_dist.")
            assert _part(other) == _part(own) or _rank(other) < _rank(own), (
                f"{own} imports {other}, which is not below it"
            )


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_heavy_packages_have_one_owner(path):
    for module in _imports(path):
        owners = OWNERS.get(module.split(".")[0])
        assert owners is None or any(_name(path).startswith(owner) for owner in owners), (
            f"{_name(path)} imports {module}"
        )


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_few_functions_take_the_whole_configuration():
    takers = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                annotations = [ast.unparse(each.annotation) for each in parameters if each.annotation]
                if any(re.search(r"\bRunConfig\b", annotation) for annotation in annotations):
                    takers.append(f"{_name(path)}: {node.name}")
    assert len(takers) <= MAX_RUN_CONFIG_TAKERS, "\n".join(takers)


def test_little_is_any():
    texts = [path.read_text(encoding="utf-8") for path in FILES]
    uses = {
        _name(path): sum(
            isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(ast.parse(text))
        )
        for path, text in zip(FILES, texts, strict=True)
    }
    lines = sum(len(text.splitlines()) for text in texts)
    most = sorted(uses, key=lambda name: -uses[name])[:10]
    assert 1000 * sum(uses.values()) <= MAX_ANY_PER_1000_LINES * lines, [(name, uses[name]) for name in most]


def test_the_root_holds_commands_and_what_everything_shares():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT


@pytest.mark.parametrize("path", sorted((PACKAGE / "simulator" / "llm").glob("*.py")), ids=_name)
def test_users_by_a_chat_model_need_nothing_of_the_embedded_appraisers(path):
    assert not any(module.startswith("rlver_dist.simulator.rules") for module in _imports(path))


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_words_that_were_given_up_stay_so(path):
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = {
        getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
        for node in tree
    }
    assert names.isdisjoint(OLD_WORDS)


def test_init_files_are_empty():
    assert [
        _name(path) for path in PACKAGE.rglob("__init__.py") if path.read_text(encoding="utf-8").strip()
    ] == []


def test_algorithms_know_no_configuration():
    for path in (PACKAGE / "algorithms").glob("*.py"):
        assert not any(module.startswith("rlver_dist.config") for module in _imports(path)), path.name


def test_every_option_is_documented_where_it_is_defined():
    modules = [path for path in sorted((PACKAGE / "config").glob("*.py")) if path.stem != "enums"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in modules]
    for group in (node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)):
        assert ast.get_docstring(group), group.name
        for field, after in zip(group.body, group.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config"):
                documented = (
                    isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                    and isinstance(after.value.value, str)
                )
                assert documented, f"{group.name}.{ast.unparse(field.target)} has no docstring below it"


def test_every_public_function_and_class_has_a_docstring():
    missing = []
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            public = isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            ) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{_name(path)}: {node.name}")
    assert missing == []
