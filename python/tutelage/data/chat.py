"""Chat templates: conversations to text, and which of the text the model answers.

A template is Jinja, as Hugging Face folders carry it (`chat_template.jinja`, `additional_chat_templates/NAME.jinja`, or
`chat_template` in tokenizer_config.json), and renders as transformers renders it. Templates come from strangers: they run in
Jinja's sandbox, and what they may compute and write is bounded by the size of what they are given.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

Span = tuple[int, int]
"""[begin, end) in characters."""

CHAT_TEMPLATE = "chat_template.jinja"
NAMED_CHAT_TEMPLATES = "additional_chat_templates"
"""The folder of further ones."""
NAMED_CHAT_TEMPLATE = re.compile(rf"{NAMED_CHAT_TEMPLATES}/([^/]*)\.jinja")

# The named templates that a conversation is rendered with.
_USED = ("default", "tool_use")
# Of what stands inside a message; far below what Python's recursion can take.
_DEEPEST = 64


class ChatTemplateError(ValueError):
    """A template that cannot be used, or a conversation that it cannot render."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    answers: tuple[Span, ...] = ()
    """What the model answers, turn by turn, each with the token that ends it."""
    special: tuple[Span, ...] | None = None
    """Where the template wrote special tokens. None: wherever one is spelled, as no message spells one."""

    def marked(self) -> str:
        """The text with ⟦answers⟧ in brackets, for messages."""
        parts, end = [], 0
        for begin, stop in self.answers:
            parts += [self.text[end:begin], "⟦", self.text[begin:stop], "⟧"]
            end = stop
        return "".join([*parts, self.text[end:]])


class ChatTemplate:
    """The chat template of a tokenizer.

    sources: name to Jinja source: "default", and "tool_use" where there is another one for conversations with
        tools. Others are for programs that ask for them by name, and are not looked at.
    variables: what templates are given beside the conversation: `bos_token`, `eos_token`…
    special_tokens: spellings of the tokenizer's special tokens.
    places: name to where a source stands, for errors.

    Raises ChatTemplateError for a source that is no template.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        variables: Mapping[str, str],
        special_tokens: Iterable[str],
        places: Mapping[str, str] | None = None,
    ) -> None:
        places = places or dict.fromkeys(sources, "chat template")
        if "default" not in sources:
            where = next(iter(places.values()), "chat template")
            raise ChatTemplateError(
                f"{where}: there is no template named 'default' (there are: {', '.join(sources) or 'none'})"
            )
        self.sources = dict(sources)
        self.variables = dict(variables)
        self.where = places["default"]
        self.special_tokens = sorted(set(special_tokens) - {""}, key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(map(re.escape, self.special_tokens)) or "(?!)")
        self._environment = _Environment()
        self._templates = {name: self._environment.compiled(sources[name], places[name]) for name in _USED if name in sources}

    @classmethod
    def from_files(cls, contents: Mapping[str, bytes], special_tokens: Iterable[str]) -> ChatTemplate | None:
        """The template among a tokenizer's files, or None where they have none."""
        found = template_sources(contents)
        if found is None:
            return None
        configs = [_object(contents.get(name)) for name in ("tokenizer_config.json", "special_tokens_map.json")]
        variables: dict[str, str] = {}
        for config in configs:
            for name, token in config.items():
                content = token.get("content") if isinstance(token, dict) else token
                if name.endswith("_token") and isinstance(content, str):
                    variables.setdefault(name, content)
        sources, places = found
        return cls(sources, variables, special_tokens, places)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        answers: bool = False,
    ) -> Rendered:
        """The text of a conversation; with `answers` also which of it the model answers.

        The answers are what stands inside `{% generation %}` where the template has such blocks. Where it has
        none, the conversation is rendered up to each assistant turn with the generation prompt, and up to behind
        it: the answer is what was added, without blanks behind the last special token.

        Where a message spells a special token, that spelling is text: `Rendered.special` then says where the
        template's own special tokens are. They are found by rendering with other characters in the messages'
        place, so the template must not look at those; one that does is refused.

        Raises ChatTemplateError: the template's own complaint, a limit, or (with `answers`) a template without
        `{% generation %}` that is not prefix-preserving, with what it rendered.
        """
        plain = self._plain_messages(messages)
        plain_tools = None if tools is None else [_plain(tool) for tool in tools]
        plain_options = {name: _plain(value) for name, value in (options or {}).items()}
        template, has_blocks = self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]

        def run(
            messages: Sequence[Mapping[str, Any]],
            prompt: bool,
            marks: tuple[str, str] | None = None,
            tools: list[Any] | None = plain_tools,
        ) -> str:
            variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
            try:
                return self._environment.run(template, {**self.variables, **plain_options, **variables}, marks)
            except Exception as error:  # a template can raise anything
                told = isinstance(error, (jinja2.TemplateError, _LimitError))
                reason = str(error) if told else f"{type(error).__name__}: {error}"
                raise ChatTemplateError(f"{self.where}: it cannot render this conversation: {reason}") from error

        text = run(plain, add_generation_prompt)
        spans: tuple[Span, ...] = ()
        if answers and has_blocks:
            spans = self._blocks(run, plain, add_generation_prompt, text)
        elif answers:
            spans = self._growth(run, plain, text)
        return Rendered(text, spans, self._own_special(run, plain, plain_tools, add_generation_prompt, text))

    def _plain_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if isinstance(messages, (str, Mapping)) or not messages:
            raise ChatTemplateError("messages must be a list of at least one {'role': …, 'content': …}")
        plain = []
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ChatTemplateError(f"message {number} must be an object with a string 'role', but it is {message!r:.80}")
            plain.append({name: _plain(value) for name, value in message.items() if value is not None})
        return plain

    def _blocks(self, run: _Run, messages: list[dict[str, Any]], prompt: bool, text: str) -> tuple[Span, ...]:
        """The `{% generation %}` blocks, by rendering once more with a mark at both ends of each."""
        opening, closing = _unused(2, text)
        marked = run(messages, prompt, marks=(opening, closing))
        spans: list[Span] = []
        place, begin = 0, -1
        for part in re.split(f"([{opening}{closing}])", marked):
            if part == opening and begin < 0:
                begin = place
            elif part == closing and begin >= 0:
                spans.append((begin, place))
                begin = -1
            elif part in (opening, closing):
                raise ChatTemplateError(f"{self.where}: it has a generation block inside of another")
            else:
                place += len(part)
        if re.sub(f"[{opening}{closing}]", "", marked) != text:
            raise ChatTemplateError(
                f"{self.where}: it changes the text of its generation blocks afterwards, so nobody can tell what of the text "
                f"is answered. It rendered\n{text}"
            )
        return tuple(span for span in spans if span[0] < span[1])

    def _growth(self, run: _Run, messages: list[dict[str, Any]], text: str) -> tuple[Span, ...]:
        """The answers, by rendering growing prefixes of the conversation."""
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, behind = run(messages[:number], True), run(messages[: number + 1], False)
            self._check_prefix(before, behind, f"what stands before message {number}, with the generation prompt,")
            self._check_prefix(behind, text, f"the conversation up to message {number}")
            end = len(behind)
            for match in self._special.finditer(behind, len(before)):
                if not behind[match.end() :].strip():
                    end = match.end()
                    break
            spans.append((len(before), end))
        return tuple(span for span in spans if span[0] < span[1])

    def _check_prefix(self, shorter: str, longer: str, what: str) -> None:
        if not longer.startswith(shorter):
            raise ChatTemplateError(
                f"{self.where}: it is not prefix-preserving, so nobody can tell what of the text is answered: {what} is "
                "rendered in another way when more follows. Mark the answers in the template with {% generation %} and "
                f"{{% endgeneration %}}. It rendered\n{shorter}\nand\n{longer}"
            )

    def _own_special(
        self, run: _Run, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool, text: str
    ) -> tuple[Span, ...] | None:
        """Where the template wrote special tokens, or None where no message (or tool) spells one."""
        given = list(_strings([messages, tools]))
        spelled = [match[0] for string in given for match in [self._special.search(string)] if match]
        if not spelled:
            return None
        # Each character that can begin a special token has one that no text has in its place where a message
        # spells such a token: then what is still spelled was written by the template.
        firsts = sorted({token[0] for token in self.special_tokens})
        hidden = dict(zip(firsts, _unused(len(firsts), text, *given), strict=True))

        def hide(value: str) -> str:
            while (shown := self._special.sub(lambda match: hidden[match[0][0]] + match[0][1:], value)) != value:
                value = shown
            return value

        shown = run(_mapped(messages, hide), prompt, tools=_mapped(tools, hide))
        if shown.translate({ord(character): first for first, character in hidden.items()}) != text:
            number = next((n for n, m in enumerate(messages) if any(map(self._special.search, _strings(m)))), None)
            who = "a tool" if number is None else f"message {number}"
            raise ChatTemplateError(
                f"{self.where}: {who} spells the special token {spelled[0]!r}, and the template looks into the text, so its "
                "own special tokens cannot be told from that one: change the text"
            )
        return tuple(match.span() for match in self._special.finditer(shown))


def template_sources(contents: Mapping[str, bytes]) -> tuple[dict[str, str], dict[str, str]] | None:
    """Of a tokenizer's files: name to Jinja source, and name to the file it stands in; None where they have none.

    Files come before tokenizer_config.json's chat_template, and among them a named one before chat_template.jinja where it is
    named default, as in transformers. Raises ChatTemplateError naming the file that cannot be read.
    """
    found = {CHAT_TEMPLATE: "default"} if CHAT_TEMPLATE in contents else {}
    found |= {name: named[1] for name in contents if (named := NAMED_CHAT_TEMPLATE.fullmatch(name))}
    if found:
        sources, places = {}, {}
        for file, name in found.items():
            try:
                sources[name], places[name] = contents[file].decode(), file
            except UnicodeDecodeError as error:
                raise ChatTemplateError(f"{file}: no UTF-8 at byte {error.start}") from error
        return sources, places
    where = "tokenizer_config.json, chat_template"
    given: object = _object(contents.get("tokenizer_config.json")).get("chat_template")
    if given is None:
        return None
    if isinstance(given, str):
        given = {"default": given}
    elif isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        given = {entry.get("name"): entry.get("template") for entry in given}
    if not isinstance(given, dict) or not all(isinstance(text, str) for entry in given.items() for text in entry):
        raise ChatTemplateError(f"{where}: it must be a template or a list of named ones")
    return given, dict.fromkeys(given, where)


class _Run(Protocol):
    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        prompt: bool,
        marks: tuple[str, str] | None = None,
        tools: list[Any] | None = None,
    ) -> str: ...


def _object(data: bytes | None) -> dict[str, Any]:
    value = json.loads(data or b"{}")
    return value if isinstance(value, dict) else {}


def _plain(value: object, depth: int = 0) -> Any:
    """The value as plain JSON types, so that a template finds no methods but theirs."""
    if depth > _DEEPEST:
        raise ChatTemplateError(f"a message is nested more than {_DEEPEST} levels deep")
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(entry, depth + 1) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, depth + 1) for entry in value]
    raise ChatTemplateError(f"a message holds {type(value).__name__}, which is not JSON")


def _strings(value: object) -> Iterator[str]:
    """Every string of a plain value, the names of fields left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _strings(entry)


def _mapped(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {name: _mapped(entry, function) for name, entry in value.items()}
    return [_mapped(entry, function) for entry in value] if isinstance(value, list) else value


def _unused(count: int, *texts: str) -> list[str]:
    """Characters for private use (Unicode's plane 16) that no text has."""
    used = set().union(*texts)
    return list(itertools.islice((c for c in map(chr, range(0x100000, 0x10FFFE)) if c not in used), count))


# --- Jinja, as transformers sets it up, with limits ---------------------------------------------------------


class _LimitError(Exception):
    """A template wants more than its share."""


class _Budget:
    """What one rendering may still do."""

    def __init__(self, size: int) -> None:
        # One operation may make a value some times as large as everything given. All together may cost 256 times that:
        # a template that looks at every message once for every message stays far below.
        self.largest = (1 << 20) + 64 * size
        self.left = (1 << 23) + 256 * size


# Filters that look at their value's items one by one, or not at all.
_SHALLOW = frozenset(
    ("count", "default", "d", "first", "items", "last", "length", "list", "map", "reject", "rejectattr", "select", "selectattr")
)
# Filters and methods of strings whose result can be as large as the product of what they are given.
_PRODUCTS = frozenset(("batch", "expandtabs", "indent", "join", "slice", "wordwrap"))
# Tests that compare, and so walk through both of what they are given.
_COMPARISONS = (
    "eq",
    "==",
    "equalto",
    "ge",
    ">=",
    "gt",
    ">",
    "greaterthan",
    "in",
    "le",
    "<=",
    "lt",
    "<",
    "lessthan",
    "ne",
    "!=",
)
_FORMATS = frozenset(("format", "format_map", "%"))
# '%*d' and '{:{}}' take their width from a value, which can be anywhere in what is given.
_WIDTH_ELSEWHERE = re.compile(r"%(\([^)]*\))?[^%A-Za-z]*\*|:[^{}]*\{")
_LARGEST_BITS = 4096


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self._finalize, cache_size=0
        )
        self._local = threading.local()
        self._body = 16
        self.generation_blocks = 0
        self.filters["tojson"] = _tojson
        for names, wanted in ((self.filters, None), (self.tests, _COMPARISONS)):
            for name in list(names if wanted is None else wanted):
                names[name] = self._limited(name, names[name])
        self.filters |= {"__each": self._each, "__sized": self._sized, "__concat": self._concat}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": self._raise, "strftime_now": _strftime_now}

    def compiled(self, source: str, where: str) -> tuple[jinja2.Template, bool]:
        """The template, and whether it has generation blocks."""
        self._body = max(self._body, 16 + len(source) // 4)
        self._local.budget = _Budget(len(source))  # constant expressions are computed here
        before = self.generation_blocks
        try:
            template = self.from_string(source)
        except Exception as error:  # a template can raise anything, its Python code SyntaxError
            at = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ChatTemplateError(f"{where}: it is no template: {at}{str(error) or type(error).__name__}") from error
        return template, self.generation_blocks > before

    def run(self, template: jinja2.Template, variables: Mapping[str, Any], marks: tuple[str, str] | None) -> str:
        self._local.budget = _Budget(1 << 40)  # what is given is as large as it is
        self._local.budget = _Budget(self._size(dict(variables)))
        self._local.marks = marks
        blocks, size = [], 0
        for block in template.generate(**variables):
            blocks.append(block)
            size += len(block)
            if size > self._local.budget.largest:
                raise _LimitError(f"it writes more than {self._local.budget.largest} characters")
        return "".join(blocks)

    # -- what costs --

    def _charge(self, cost: int) -> None:
        self._local.budget.left -= cost
        if self._local.budget.left < 0:
            raise _LimitError("it computes for too long")

    def _size(self, value: object) -> int:
        """Characters, roughly, that a value needs when it is written out; raises _LimitError for too many."""
        total, values = 0, [value]
        while values:
            value = values.pop()
            if isinstance(value, (dict, list, tuple, set, frozenset)):
                total += len(value)
                values.extend(value)
                if isinstance(value, dict):
                    values.extend(value.values())
            elif isinstance(value, int):
                total += 1 + value.bit_length() // 3
            else:
                total += len(value) if isinstance(value, (str, bytes, range)) else 1
            if total > self._local.budget.largest:
                raise _LimitError("it makes a value that is too large")
        return total

    def _admit(self, name: str, value: object, others: Iterable[object]) -> None:
        """Before an operation on `value`: charges what it costs, refuses what would become too large."""
        size, sizes = self._size(value), [self._size(other) + (abs(other) if isinstance(other, int) else 0) for other in others]
        cost = (1 + size) * (1 + sum(sizes)) if name in _PRODUCTS else size + sum(sizes)
        if name == "replace" and len(sizes) > 1:  # of an old text by a new one
            cost += (size // max(sizes[0], 1) + 1) * sizes[1]
        if name in _FORMATS and isinstance(value, str):
            if _WIDTH_ELSEWHERE.search(value):
                raise _LimitError(f"the width of {value!r:.80} does not stand in it")
            cost += sum(int(number) if len(number) < 10 else 1 << 62 for number in re.findall(r"\d+", value))
        if cost > self._local.budget.largest:
            raise _LimitError(f"{name} would make a value that is too large")
        self._charge(16 + cost)

    def _limited(self, name: str, function: Any) -> Callable[..., Any]:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment

        @functools.wraps(function)  # Jinja's marks on the function are kept
        def limited(*args: Any, **kwargs: Any) -> Any:
            if name == "join" and len(args) > skipped and isinstance(args[skipped], Iterator):
                args = (*args[:skipped], list(args[skipped]), *args[skipped + 1 :])
            value = args[skipped] if len(args) > skipped else None
            if name in _SHALLOW:
                self._charge(16 + (len(value) if isinstance(value, (list, dict, range)) else 0))
            else:
                self._admit(name, value, [*args[skipped + 1 :], *kwargs.values()])
            return function(*args, **kwargs)

        return limited

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            self._admit(method.__name__, owner, [*args, *kwargs.values()])
        else:
            self._charge(self._body if isinstance(obj, (Macro, LoopContext)) else 16)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            bits = [value.bit_length() if isinstance(value, int) else 64 for value in (left, right)]
            if (bits[0] * min(abs(right), _LARGEST_BITS + 1) if operator == "**" else sum(bits)) > _LARGEST_BITS:
                raise _LimitError("it makes a number that is too large")
            self._charge(1)
        elif operator == "*" and isinstance(left, int):
            self._charge_repeated(right, left)
        elif operator == "*" and isinstance(right, int):
            self._charge_repeated(left, right)
        elif operator == "+" and isinstance(left, (str, list, tuple)):
            self._charge_repeated(left, 1)
            self._charge_repeated(right, 1)
        else:
            self._admit(operator, left, [right])
        return super().call_binop(context, operator, left, right)

    def _charge_repeated(self, value: object, times: int) -> None:
        size = (len(value) if isinstance(value, (str, list, tuple)) else 1) * max(times, 1)
        if size > self._local.budget.largest:
            raise _LimitError("it makes a value that is too large")
        self._charge(size)

    def _finalize(self, value: Any) -> Any:
        self._charge(self._size(value))
        return value

    def _each(self, values: Any) -> Iterator[Any]:
        for value in values:
            self._charge(self._body)
            yield value

    def _sized(self, value: Any) -> Any:
        self._charge(self._size(value))
        return value

    def _concat(self, values: list[Any]) -> str:
        self._charge(self._size(values))
        return "".join(map(str, values))

    def _raise(self, message: Any) -> None:
        self._sized(message)
        raise jinja2.TemplateError(str(message))

    def mark(self, text: str) -> str:
        """What a generation block wrote, with the marks that were asked for."""
        marks = self._local.marks
        return text if marks is None else f"{marks[0]}{text}{marks[1]}"

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The syntax tree, with a filter of ours where Jinja itself would compute without asking anybody."""
        tree = super()._parse(source, name, filename)
        _Limits().visit(tree)
        return tree


class _Limits(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 (the name is Jinja's)
        self.generic_visit(node)
        node.iter = _filter("__each", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return _filter("__concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        self.generic_visit(node)
        node.expr = _filter("__sized", node.expr)
        for operand in node.ops:
            operand.expr = _filter("__sized", operand.expr)
        return node


def _filter(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what the model answers."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own annotation)
    environment: _Environment

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        self.environment.generation_blocks += 1
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return self.environment.mark(caller())


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Not Jinja's, which escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
