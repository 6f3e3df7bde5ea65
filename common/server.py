"""The policy behind a server that speaks OpenAI's /v1/completions, as vLLM and SGLang do.

    vllm serve Qwen/Qwen2.5-7B-Instruct
    python search.py --strategy beam --policy http://localhost:8000/v1 --prm runs/prm --task gsm8k

An address of a policy or of a PRM (prm_server.py) is http://host:port/path?model=NAME#FOLDER, with
all behind the path optional:

    NAME     the model's name on the server (its only one)
    FOLDER   folder or hub id of its config.json and tokenizer (what the server says it has loaded,
             else NAME); of a policy, "plain" asks the bare question, without a chat template

The server's own prefix cache cannot be seen from here: `prefilled` stays 0.
"""
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from transformers import AutoTokenizer

from common.driver import warn_once
from common.models import address_parts, load_pretrained
from common.node import Node, child_key, next_keys
from common.policy import FINAL, Policy, chat_prompt, step_end
from common.run import expect
from common.thinking import END, split_thought

NO_CARDS = (AttributeError, KeyError, TypeError)  # of a reply that is no list of models


def connect(url, retries=5):
    """The openai client of a server: it retries after growing pauses."""
    from openai import OpenAI  # imported where it is needed: seconds that others need not wait
    return OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"),
                  max_retries=retries, timeout=600)


def answered(client, request):
    """request(), with one-line errors."""
    from openai import APIConnectionError, APIStatusError
    url = str(client.base_url).rstrip("/")
    try:
        return request()
    except APIStatusError as error:
        raise ValueError(f"{url} refused the request ({error.status_code}): "
                         f"{error.message[:500]}") from error
    except APIConnectionError as error:
        raise ValueError(f"{url} did not answer, in {client.max_retries + 1} tries: "
                         f"{error.__cause__ or error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{url} sent malformed JSON ({error})") from error


def find_model(address, client, url):
    """(its name on the server, where its config.json and tokenizer are): by the address, else by
    the server's list. ValueError: the server has several, and the address does not say which."""
    _, name, folder = address_parts(address)
    if name and folder:
        return name, folder
    try:
        cards = listed(client, url)
    except ValueError as error:
        cause = error.__cause__
        no_list = isinstance(cause, NO_CARDS) or getattr(cause, "status_code", 0) in (404, 405)
        if not name or not no_list:
            raise
        cards = {}  # the name has to do
    if not name:
        expect(len(cards) == 1, f"{url} serves {', '.join(cards) or 'nothing'}: "
               "?model=NAME behind it says which")
        [name] = cards
    return name, folder or cards.get(name, name)


def listed(client, url):
    """{name: what it has loaded} of the server's models."""
    # two seconds, not twenty, until a wrong address is an error
    client = client.with_options(max_retries=min(2, client.max_retries))
    reply = answered(client, lambda: client.get("/models", cast_to=object))
    try:
        return {card["id"]: card.get("root") or card["id"] for card in reply["data"]}
    except NO_CARDS as error:
        raise ValueError(f"{url}/models sent no list of models: {str(reply)[:200]!r}") from error


def identity(address):
    """What tells the model at a policy's or PRM's address from another one there: by the address,
    else by the server, which has to be up."""
    url, name, _ = address_parts(address)
    if name:
        return [name]
    url = url.rstrip("/")
    url += "" if urlsplit(url).path else "/v1"
    return list(find_model(address, connect(url), url))


def chat_tokenizer(folder, url):
    """The tokenizer that puts a question into the model's chat template, None if it has none: then
    the server gets text, and its own tokenizer adds the BOS."""
    if folder == "plain":
        return None
    if "/" not in folder and not Path(folder).is_dir():
        warn_once(f"warning: {url} serves {folder!r}, whose chat template is not known here: the "
                  f"prompt is the bare question. {url}#FOLDER names a folder or hub id that has it")
        return None
    try:
        tokenizer = load_pretrained(AutoTokenizer, folder)
    except ValueError as error:
        raise ValueError(f"{url}: the tokenizer of its model is needed here for the chat template; "
                         f"{url}#FOLDER says where it is, #plain does without ({error})") from error
    return tokenizer if tokenizer.chat_template else None


class ServerPolicy(Policy):
    """The policy at an address. separator None: as load_policy() of common/policy.py has it."""
    context = None  # the server knows it, and says so

    def __init__(self, address, separator=None, retries=5, **settings):
        self.url, _, _ = address_parts(address)
        self.client = connect(self.url, retries)
        self.served, folder = find_model(address, self.client, self.url)
        config = Path(folder, "config.json")  # of a folder of ours; the hub's models do not say
        said = json.loads(config.read_text()) if config.is_file() else {}
        separator = separator or said.get("step_separator") or "\n\n"
        self.configure(chat_tokenizer(folder, self.url), separator, **settings)
        self.sampling = {"temperature": self.temperature, "top_p": self.top_p}
        if self.tokenizer:  # the template has a BOS: the server's tokenizer would add a second one
            self.sampling["extra_body"] = {"add_special_tokens": False}
        self.pool = ThreadPoolExecutor(32)

    def _ids(self, text, domain=None):
        return ()  # the server has the tokens

    def _generate(self, nodes, n, whole):
        jobs = [(*job, whole) for job in next_keys(nodes, n)]
        groups = list(self.pool.map(lambda job: self._sample(*job), jobs))
        # counted here, not by the threads, whose += could overwrite each other's
        for node, group in zip(nodes, groups):
            self.generated += sum(end.tokens() - node.tokens() for end in group)
        return groups

    def _sample(self, parent, keys, whole):
        """One request for all samples of a node, or several where a server ignores n."""
        left = self.max_solution_tokens - parent.tokens()
        most = max(1, min(left, self._limit(parent, whole)))
        request = {"prompt": self._text(parent), "max_tokens": most}
        if not whole:
            request["stop"] = [self.separator]
        choices = []
        while len(choices) < len(keys):
            choices += self._ask(request, len(keys) - len(choices), keys[len(choices)])
        return [self._nodes(parent, key, choice, request, whole)
                for key, choice in zip(keys, choices)]

    def _ask(self, request, n, key):
        """The server's choices, each with its tokens' log-probabilities as `logps`."""
        # the seed is the first sample's key, so that a rerun draws the same
        reply = answered(self.client, lambda: self.client.completions.create(
            model=self.served, n=n, seed=key % (1 << 31), logprobs=0, **self.sampling, **request))
        expect(reply.choices, f"{self.url} sent no choices")
        for choice in reply.choices:
            choice.logps = self._logps(choice, reply)
        return reply.choices

    def _logps(self, choice, reply):
        """Without logprobs (`transformers serve`) a lone choice still has its number of tokens."""
        values = choice.logprobs.token_logprobs if choice.logprobs else None
        if values is None:
            expect(len(reply.choices) == 1 and reply.usage, f"{self.url} sent no logprobs, so "
                   "tokens cannot be counted: start it with them on")
            return [float("nan")] * reply.usage.completion_tokens
        return [value or 0.0 for value in values]

    def _nodes(self, parent, key, choice, request, whole):
        """A choice as nodes below parent, one a step; returns the last."""
        text, logps, opening = choice.text, choice.logps, self._opening(parent)
        if not whole:
            text, logps, choice = self._whole_step(choice, request, key, opening)
        thought, text = split_thought(text, opening)
        parts = cut(text, self.separator) if whole else [text]
        share = len(logps) // len(parts)  # the reply does not say which token is in which step
        node = parent
        for i, part in enumerate(parts):
            count = share if i else len(logps) - share * (len(parts) - 1)
            own_key = key if i == len(parts) - 1 else child_key(key, f"step {i}")
            node = Node(part.removesuffix(self.separator).strip("\n"), node, [0] * count,
                        0.0 if i else sum(logps), key=own_key, depth=node.depth + 1,
                        domain=parent.domain, thought="" if i else thought)
        said = stopped_by(choice)
        if FINAL.search(node.text):
            node.end = "answer"
        elif choice.finish_reason == "length":
            node.end = "length"
        elif whole or said == "end" or said == "unknown" and not text.strip():
            node.end = "eos"  # a server that does not say shows it one request later, by no text
        elif node.depth >= self.max_steps:
            node.end = "length"
        return node

    def _whole_step(self, choice, request, key, opening):
        """(text, log-probabilities, last choice) of a step. A separator inside a thought or a code
        fence ends no step: ask for what follows."""
        text, logps, stop = choice.text, choice.logps, self.separator
        while choice.finish_reason == "stop" and stopped_by(choice) != "end":
            # the server leaves out what stopped it, or it does not
            longer = text.removesuffix(stop) + (f"{END}\n\n" if stop == END else stop)
            thought, step = split_thought(longer, opening)
            thinks = thought and END not in thought
            if not thinks and (step.strip() or not thought) and step.count("```") % 2 == 0:
                break
            left = request["max_tokens"] - len(logps)
            if left <= 0:
                choice.finish_reason = "length"
                break
            text, stop = longer, END if thinks else self.separator
            more = {"prompt": request["prompt"] + text, "max_tokens": left, "stop": [stop]}
            [choice] = self._ask(request | more, 1, key)
            if not choice.text and not thinks:
                break  # an end of text inside the fence: asking again would change nothing
            text, logps = text + choice.text, logps + choice.logps
        return text, logps, choice

    def _text(self, node):
        root = node.root()
        prompt = root.text + self.separator
        if self.tokenizer:
            prompt = chat_prompt(self.tokenizer, root.text, root.domain, False, self.thinking)
        return prompt + "".join(s.thought + s.text + self.separator for s in node.path())


def stopped_by(choice):
    """"separator", "end", or "unknown". Servers call both "stop". vLLM's stop_reason and SGLang's
    matched_stop tell them apart: a text is the separator; None or a token's number the end."""
    said = choice.model_extra or {}
    if not {"stop_reason", "matched_stop"} & said.keys():
        return "unknown"
    stop = said.get("stop_reason", said.get("matched_stop"))
    return "separator" if isinstance(stop, str) else "end"


def cut(text, separator):
    """A whole solution's text into steps, where propose() would have stopped."""
    parts = []
    while (at := step_end(text, separator)) >= 0:
        parts.append(text[:at])
        text = text[at + len(separator):]
    return parts + [text] if text.strip() or not parts else parts
