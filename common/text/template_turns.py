"""Where each turn stands in a rendered conversation, found with one rendering, for templates that write turn by turn.

A chat template may write a turn as it likes, with the whole conversation before it. One that goes over the messages once and
looks at nothing but the turn that it writes, those before it and the first one is told by its syntax tree. What it writes of
the first k turns is then the same however many follow, and so is what it writes behind the last one.
"""

import secrets
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import nodes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

MARK = f"\ue000{secrets.token_hex(16)}\ue001"  # unknown to whoever writes messages
OF_LOOP = {"index", "index0", "first", "previtem"}  # without a look at what follows
BEHIND = {"add_generation_prompt", "bos_token", "eos_token"}  # what is known behind the loop, whatever was in it
OTHERS = (nodes.Block, nodes.Break, nodes.Extends, nodes.FromImport, nodes.Import, nodes.Include)


class Marked(NamedTuple):
    """A template that marks where it begins a turn, and where its last one ends."""

    template: Any
    first: int  # shortest conversation for which it holds that a longer one begins as this one


def turn_starts(
    tokenizer: "Tokenizer", turns: list, tools: list | None, strftime_now: Callable[[str], str], whole: str
) -> dict[int, int]:
    """Index of a turn -> where it begins in `whole`, the rendering of `turns`, and of `len(turns)` where the last one ends:
    turns before it are written so in every conversation that begins with them. Empty where that cannot be told."""
    marked = _marked(str(tokenizer.get_chat_template(tools=tools)))
    if marked is None:
        return {}
    names = {**tokenizer.special_tokens_map, "messages": turns, "tools": tools, "documents": None}
    pieces = marked.template.render(**names, strftime_now=strftime_now, add_generation_prompt=False).split(MARK)
    if "".join(pieces) != whole:
        return {}
    at, found = 0, dict[int, int]()
    skipped = len(turns) - (len(pieces) - 2)  # by a slice, as messages[1:]
    for index, piece in enumerate(pieces[:-1]):
        at += len(piece)
        if skipped + index >= marked.first:
            found[skipped + index] = at
    return found


@lru_cache(8)
def _marked(template: str) -> Marked | None:
    """None where the syntax tree does not say that turns are written one by one."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(template).environment
    tree = environment.parse(template)
    aliases, slices = _aliases(tree)
    loops = [node for node in tree.body if isinstance(node, nodes.For) and _is_alias(node.iter, aliases)]
    if len(loops) != 1 or any(True for _ in tree.find_all(OTHERS)):
        return None
    loop = loops[0]
    at = tree.body.index(loop)
    allowed = {*map(id, _names(loop.iter)), *_allowed_uses(tree, aliases)}
    if any(node.name in aliases and id(node) not in allowed for node in tree.find_all(nodes.Name)):
        return None
    if loop.test or loop.else_ or loop.recursive or not _looks_back(loop.body):
        return None
    behind = [name for node in tree.body[at + 1 :] for name in _names(node)]
    if any(name.name not in BEHIND and id(name) not in allowed for name in behind):
        return None
    assigned = [node.target for node in tree.find_all(nodes.Assign) if not isinstance(node.node, nodes.Const)]
    if any(name.name in BEHIND for target in assigned for name in _names(target)):
        return None
    if any(node.name == "random" for node in tree.find_all(nodes.Filter)):
        return None
    mark = nodes.Output([nodes.TemplateData(MARK)])
    loop.body.insert(0, mark)
    tree.body.insert(at + 1, mark)
    for node in (mark, *mark.nodes):
        node.set_lineno(1).set_environment(environment)
    return Marked(environment.from_string(tree), 1 + slices)


def _aliases(tree: nodes.Template) -> tuple[set[str], int]:
    """Names of the messages or of those from some number on, and how many the slices may skip together."""
    assigned = [(n, n.target.name) for n in tree.find_all(nodes.Assign) if isinstance(n.target, nodes.Name)]
    found, known = {"messages"}, 0
    while len(found) > known:
        known = len(found)
        found |= {name for node, name in assigned if _is_alias(node.node, found)}
    rests = [node for node in tree.find_all(nodes.Getitem) if _is_rest(node, found)]
    return found, sum(const.value for node in rests for const in node.arg.find_all(nodes.Const))


def _is_alias(node: nodes.Node, aliases: set[str]) -> bool:
    return _is_rest(node, aliases) or (isinstance(node, nodes.Name) and node.name in aliases)


def _is_rest(node: nodes.Node, aliases: set[str]) -> bool:
    """As `messages[1:]`."""
    if not isinstance(node, nodes.Getitem) or not isinstance(node.node, nodes.Name) or node.node.name not in aliases:
        return False
    part = node.arg
    if not isinstance(part, nodes.Slice) or part.stop is not None or part.step is not None:
        return False
    return isinstance(part.start, nodes.Const) and isinstance(part.start.value, int) and part.start.value >= 0


def _allowed_uses(tree: nodes.Template, aliases: set[str]) -> Iterator[int]:
    """Names of the messages that tell nothing of their number: `messages[0]`, and where one is given another name."""
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.node, nodes.Name) and isinstance(item.arg, nodes.Const) and item.arg.value == 0:
            yield id(item.node)
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name) and _is_alias(node.node, aliases):
            yield id(node.target)
            yield from map(id, _names(node.node))


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    if isinstance(node, nodes.Name):
        yield node
    yield from node.find_all(nodes.Name)


def _looks_back(body: list[nodes.Node]) -> bool:
    """Whether nothing in a loop asks it for what follows. A loop within has a `loop` of its own."""
    for node in body:
        if isinstance(node, nodes.Name) and node.name == "loop":
            return False
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop":
            if node.attr not in OF_LOOP:
                return False
        elif isinstance(node, nodes.For):
            if not _looks_back([node.iter, *node.else_]):
                return False
        elif not _looks_back(list(node.iter_child_nodes())):
            return False
    return True
