"""The policy behind an OpenAI-compatible server (vLLM, SGLang)."""
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from common.node import Node, child_key, next_keys
from common.policy import FINAL, Policy, chat_prompt, step_end


class ServerPolicy:
    """The same interface over an OpenAI-compatible server: plain /v1/completions with n, stop, logprobs and seed.

    The server keeps its own prefix cache, and what it spares cannot be seen from here: `prefilled` stays 0.
    chat_tokenizer, if given, is only used to put the question into the model's chat template.
    """
    def __init__(self, url, model, chat_tokenizer=None, separator="\n\n", seed=0, temperature=1.0, top_p=1.0,
                 max_step_tokens=512, max_steps=40, max_solution_tokens=2048, retries=5):
        self.url, self.served, self.chat_tokenizer, self.separator = url.rstrip("/"), model, chat_tokenizer, separator
        self.seed, self.sampling = seed, {"temperature": temperature, "top_p": top_p}
        self.max_step_tokens, self.max_steps, self.max_solution_tokens = max_step_tokens, max_steps, max_solution_tokens
        self.retries, self.pool, self.returns_stop = retries, ThreadPoolExecutor(32), False
        self.generated = self.prefilled = 0

    root, adopt, propose, complete = Policy.root, Policy.adopt, Policy.propose, Policy.complete

    def _ids(self, text, domain=None):
        return ()  # the server has the tokens

    def _generate(self, nodes, n, whole):
        groups = list(self.pool.map(lambda job: self._sample(*job, whole), next_keys(nodes, n)))
        # counted here, not by the threads, whose += could overwrite each other's
        self.generated += sum(end.tokens() - node.tokens() for node, group in zip(nodes, groups) for end in group)
        return groups

    def _sample(self, parent, keys, whole):
        """One request for all samples of a node, or several where a server ignores n (`transformers serve` does).
        The seed is the first sample's key, so a rerun draws the same."""
        body = {"model": self.served, "prompt": self._text(parent), "logprobs": 0, **self.sampling,
                "max_tokens": max(1, min(self.max_solution_tokens - parent.tokens(),
                                         self.max_step_tokens * (self.max_steps if whole else 1)))}
        if not whole:
            body["stop"] = [self.separator]
        choices = []
        while len(choices) < len(keys):
            choices += self._post({**body, "n": len(keys) - len(choices), "seed": keys[len(choices)] % (1 << 31)})
        return [self._node(parent, key, choice, body, whole) for key, choice in zip(keys, choices)]

    def _node(self, parent, key, choice, body, whole):
        text, logps, reason = choice["text"], choice["logps"], choice.get("finish_reason")
        # Servers call both the separator and the end of text "stop". vLLM's stop_reason tells them apart (None: the
        # end), and so does a server that returns the separator; else the end shows one request later, as no text.
        self.returns_stop |= not whole and text.endswith(self.separator)
        while not whole and reason == "stop" and text.count("```") % 2 and isinstance(_stop(choice), str):
            if len(logps) >= body["max_tokens"]:
                reason = "length"
                break
            before = text.removesuffix(self.separator) + self.separator  # stopped inside a code fence: go on
            choice = self._post({**body, "prompt": body["prompt"] + before, "n": 1, "seed": key % (1 << 31),
                                 "max_tokens": body["max_tokens"] - len(logps)})[0]
            if not choice["text"]:
                break  # an end of text inside the fence: asking again would change nothing
            text, logps, reason = before + choice["text"], logps + choice["logps"], choice.get("finish_reason")
            self.returns_stop |= choice["text"].endswith(self.separator)
        over = whole or not isinstance(_stop(choice), str) or _stop(choice) == "?" and (
            not text.strip() or self.returns_stop and not text.endswith(self.separator))
        parts = [text] if not whole else _cut(text, self.separator)
        node = parent
        for i, part in enumerate(parts):
            share = len(logps) // len(parts) if i else len(logps) - len(logps) // len(parts) * (len(parts) - 1)
            node = Node(part.removesuffix(self.separator).strip("\n"), node, [0] * share, sum(logps) if i == 0 else 0.0,
                        depth=node.depth + 1, domain=parent.domain,
                        key=key if i == len(parts) - 1 else child_key(key, f"step {i}"))
        node.end = ("answer" if FINAL.search(node.text) else "length" if reason == "length" else "eos" if over else
                    "length" if node.depth >= self.max_steps else None)
        return node

    def _text(self, node):
        root = node.root()
        prompt = root.text + self.separator
        if self.chat_tokenizer is not None:
            prompt = chat_prompt(self.chat_tokenizer, root.text, root.domain, tokenize=False)
        return prompt + "".join(n.text + self.separator for n in node.path())

    def _post(self, body):
        """POST -> choices, each with its tokens' log-probabilities as "logps". Retries on connection errors, 429 and
        5xx, waiting 1, 2, 4 ... s; other errors are the server's own words as a ValueError."""
        request = urllib.request.Request(self.url + "/completions", json.dumps(body).encode(), {
            "Content-Type": "application/json", "Authorization": "Bearer " + os.environ.get("OPENAI_API_KEY", "none")})
        for wait in [*(2 ** i for i in range(self.retries - 1)), 0]:
            try:
                with urllib.request.urlopen(request, timeout=600) as reply:
                    return _choices(json.load(reply), self.url)
            except urllib.error.HTTPError as error:
                words = error.read().decode(errors="replace")[:500]
                if error.code != 429 and error.code < 500:
                    raise ValueError(f"{self.url} refused the request ({error.code}): {words}") from error
            except (OSError, http.client.HTTPException) as error:  # no connection, or none any more
                words = str(error)
            time.sleep(wait)
        raise ValueError(f"{self.url} did not answer after {self.retries} tries: {words}")


def _stop(choice):
    """What ended a choice: a text is the separator, None (vLLM) or a token's number (SGLang, and vLLM's second
    end-of-text token) the end; "?" where the server does not say."""
    return choice.get("stop_reason", choice.get("matched_stop", "?"))


def _choices(answer, url):
    """Without logprobs (`transformers serve`) a lone choice still has its number of tokens; their logps are NaN."""
    for choice in answer["choices"]:
        found = (choice.get("logprobs") or {}).get("token_logprobs")
        if found is None:
            if len(answer["choices"]) > 1 or "usage" not in answer:
                raise ValueError(f"{url} sent no logprobs, so tokens cannot be counted: start it with them on")
            found = [float("nan")] * answer["usage"]["completion_tokens"]
        choice["logps"] = [x or 0.0 for x in found]
    if not answer["choices"]:
        raise ValueError(f"{url} sent no choices")
    return answer["choices"]


def _cut(text, separator):
    """A whole solution's text into steps, where propose() would have stopped."""
    parts = []
    while (at := step_end(text, separator)) >= 0:
        parts.append(text[:at])
        text = text[at + len(separator):]
    return parts + [text] if text.strip() or not parts else parts
