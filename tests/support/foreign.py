"""LLaMA as others lay it out, from the formulas and in float64, with adapters in their formats."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM

EPS = 1e-5
THETA = 10000.0


@dataclass(frozen=True)
class Sizes:
    """Of a model and its adapter."""

    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 6
    hidden: int = 24
    intermediate: int = 16
    vocab: int = 40
    adapter_len: int = 3
    adapter_layers: int = 2


class OriginalLlama:
    """LLaMA in the layout of its first release: rotary pairs are neighbours, one key for a query."""

    def __init__(self, sizes, seed=0):
        self.sizes = sizes
        draw = _Draw(seed)
        self.weights = {
            "tok_embeddings.weight": draw(sizes.vocab, sizes.hidden, scale=1),
            "norm.weight": draw.norm(sizes.hidden),
            "output.weight": draw(sizes.vocab, sizes.hidden),
        }
        for i in range(sizes.layers):
            shapes = {
                **{f"attention.{name}": (sizes.hidden,) * 2 for name in ("wq", "wk", "wv", "wo")},
                "feed_forward.w1": (sizes.intermediate, sizes.hidden),
                "feed_forward.w2": (sizes.hidden, sizes.intermediate),
                "feed_forward.w3": (sizes.intermediate, sizes.hidden),
            }
            for name, shape in shapes.items():
                self.weights[f"layers.{i}.{name}.weight"] = draw(*shape)
            for name in ("attention_norm", "ffn_norm"):
                self.weights[f"layers.{i}.{name}.weight"] = draw.norm(sizes.hidden)

    def adapter(self, seed=1, *, gate="head"):
        """Return an adapter as LLaMA-Adapter saves it: gates for all layers, open in those it adapts."""
        sizes, draw = self.sizes, _Draw(seed)
        count = sizes.adapter_layers
        gate_shape = (1,) if gate == "layer" else (1, sizes.heads, 1, 1)
        state = {}
        for i in range(sizes.layers):
            adapted = i >= sizes.layers - count
            value = draw.gates(*gate_shape) if adapted else torch.zeros(gate_shape).double()
            state[f"layers.{i}.attention.gate"] = value
        rows = count * sizes.adapter_len
        return {**state, "adapter_query.weight": draw(rows, sizes.hidden, scale=1)}

    def logits(self, ids, adapter=None, activation="tanh"):
        """Run the model, with an adapter in its own format or without one."""
        sizes = self.sizes
        x = self.weights["tok_embeddings.weight"][ids]
        for i in range(sizes.layers):
            block = i - (sizes.layers - sizes.adapter_layers)
            prompt = gate = None
            if adapter is not None and block >= 0:
                rows = slice(block * sizes.adapter_len, (block + 1) * sizes.adapter_len)
                prompt = adapter["adapter_query.weight"][rows]
                gate = adapter[f"layers.{i}.attention.gate"].view(-1, 1, 1)
                gate = torch.tanh(gate) if activation == "tanh" else gate
            x = x + self._attention(i, rms_norm(x, self._of(i, "attention_norm")), prompt, gate)
            h = rms_norm(x, self._of(i, "ffn_norm"))
            up = silu(h @ self._of(i, "feed_forward.w1").T) * (h @ self._of(i, "feed_forward.w3").T)
            x = x + up @ self._of(i, "feed_forward.w2").T
        return rms_norm(x, self.weights["norm.weight"]) @ self.weights["output.weight"].T

    def _of(self, i, name):
        return self.weights[f"layers.{i}.{name}.weight"]

    def _attention(self, i, x, prompt, gate):
        def project(name, y):
            out = y @ self._of(i, f"attention.{name}").T
            # As (..., heads, length, head_dim).
            return out.unflatten(-1, (self.sizes.heads, -1)).transpose(-2, -3)

        query, key = (rotate_neighbours(project(name, x)) for name in ("wq", "wk"))
        value = project("wv", x)
        shares = causal_shares(query, key)
        if prompt is not None:
            # Before the tokens, with a softmax of their own and without positions.
            prompt_key, prompt_value = project("wk", prompt), project("wv", prompt)
            scores = query @ prompt_key.transpose(-1, -2) / math.sqrt(self.sizes.head_dim)
            shares = torch.cat([gate * scores.softmax(-1), shares], dim=-1)
            value = torch.cat([prompt_value.expand(len(x), -1, -1, -1), value], dim=-2)
        return (shares @ value).transpose(1, 2).flatten(2) @ self._of(i, "attention.wo").T

    def to_transformers(self):
        """Return the same model in transformers: rotary pairs are half a head apart."""

        def halves(weight):
            pairs = weight.view(self.sizes.heads, self.sizes.head_dim // 2, 2, -1)
            return pairs.transpose(1, 2).reshape(weight.shape)

        state = {
            "model.embed_tokens.weight": self.weights["tok_embeddings.weight"],
            "model.norm.weight": self.weights["norm.weight"],
            "lm_head.weight": self.weights["output.weight"],
        }
        for i in range(self.sizes.layers):
            parts = {
                "self_attn.q_proj": halves(self._of(i, "attention.wq")),
                "self_attn.k_proj": halves(self._of(i, "attention.wk")),
                "self_attn.v_proj": self._of(i, "attention.wv"),
                "self_attn.o_proj": self._of(i, "attention.wo"),
                "mlp.gate_proj": self._of(i, "feed_forward.w1"),
                "mlp.down_proj": self._of(i, "feed_forward.w2"),
                "mlp.up_proj": self._of(i, "feed_forward.w3"),
                "input_layernorm": self._of(i, "attention_norm"),
                "post_attention_layernorm": self._of(i, "ffn_norm"),
            }
            state |= {f"model.layers.{i}.{name}.weight": value for name, value in parts.items()}
        return transformers_llama(self.sizes, state)


class LitGPT:
    """A LLaMA of litgpt: one projection for queries, keys and values, which may share heads.

    Args:
        sizes: Of the model and its adapter.
        layout: Of the projection's rows: `"grouped"`, each key-value head after its queries (until
            0.5.4), or `"concatenated"`.
        seed: Of the weights.
    """

    def __init__(self, sizes, layout, seed=0):
        self.sizes, self.layout = sizes, layout
        draw = _Draw(seed)
        width = sizes.heads * sizes.head_dim
        fused = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
        self.weights = {
            "transformer.wte.weight": draw(sizes.vocab, sizes.hidden, scale=1),
            "transformer.ln_f.weight": draw.norm(sizes.hidden),
            "lm_head.weight": draw(sizes.vocab, sizes.hidden),
        }
        for i in range(sizes.layers):
            parts = {
                "attn.qkv.weight": draw(fused, sizes.hidden),
                "attn.qkv.bias": draw(fused, scale=0.3),
                "attn.proj.weight": draw(sizes.hidden, width),
                "attn.proj.bias": draw(sizes.hidden, scale=0.3),
                "mlp.fc_1.weight": draw(sizes.intermediate, sizes.hidden),
                "mlp.fc_2.weight": draw(sizes.intermediate, sizes.hidden),
                "mlp.proj.weight": draw(sizes.hidden, sizes.intermediate),
                "norm_1.weight": draw.norm(sizes.hidden),
                "norm_2.weight": draw.norm(sizes.hidden),
            }
            self.weights |= {f"transformer.h.{i}.{name}": value for name, value in parts.items()}

    def adapter(self, seed=1, *, gate="head"):
        """Return an adapter as litgpt saves it."""
        sizes, draw = self.sizes, _Draw(seed)
        shape = {
            "head": (1, 1, sizes.heads, 1),
            "head, before": (1, sizes.heads, 1, 1),
            "layer": (1,),
        }[gate]
        state = {}
        for i in range(sizes.layers - sizes.adapter_layers, sizes.layers):
            at = f"transformer.h.{i}.attn"
            state[f"{at}.gating_factor"] = draw.gates(*shape)
            state[f"{at}.adapter_wte.weight"] = draw(sizes.adapter_len, sizes.hidden, scale=1)
        return state

    def logits(self, ids, adapter=None):
        """Run the model, with an adapter in its own format or without one."""
        x = self.weights["transformer.wte.weight"][ids]
        for i in range(self.sizes.layers):
            prompt = gate = None
            if adapter is not None and i >= self.sizes.layers - self.sizes.adapter_layers:
                prompt = adapter[f"transformer.h.{i}.attn.adapter_wte.weight"]
                gate = adapter[f"transformer.h.{i}.attn.gating_factor"].view(-1, 1, 1)
            x = x + self._attention(i, rms_norm(x, self._of(i, "norm_1.weight")), prompt, gate)
            h = rms_norm(x, self._of(i, "norm_2.weight"))
            up = silu(h @ self._of(i, "mlp.fc_1.weight").T) * (h @ self._of(i, "mlp.fc_2.weight").T)
            x = x + up @ self._of(i, "mlp.proj.weight").T
        x = rms_norm(x, self.weights["transformer.ln_f.weight"])
        return x @ self.weights["lm_head.weight"].T

    def _of(self, i, name):
        return self.weights[f"transformer.h.{i}.{name}"]

    def _split(self, fused):
        """Split the last axis into queries, keys and values, flat."""
        sizes = self.sizes
        if self.layout == "concatenated":
            counts = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
            return fused.split([n * sizes.head_dim for n in counts], dim=-1)
        queries = sizes.heads // sizes.kv_heads
        # (..., kv_heads, queries + 2, head_dim): the queries of a key, the key, the value.
        grouped = fused.unflatten(-1, (sizes.kv_heads, queries + 2, sizes.head_dim))
        return [part.flatten(-3) for part in grouped.split([queries, 1, 1], dim=-2)]

    def _project(self, i, x):
        fused = x @ self._of(i, "attn.qkv.weight").T + self._of(i, "attn.qkv.bias")
        counts = (self.sizes.heads, self.sizes.kv_heads, self.sizes.kv_heads)
        # (..., heads, length, head_dim), keys and values repeated for the queries that share them.
        return [
            part.unflatten(-1, (count, -1))
            .transpose(-2, -3)
            .repeat_interleave(self.sizes.heads // count, dim=-3)
            for part, count in zip(self._split(fused), counts, strict=True)
        ]

    def _attention(self, i, x, prompt, gate):
        query, key, value = self._project(i, x)
        query, key = rotate_halves(query), rotate_halves(key)
        out = causal_shares(query, key) @ value
        if prompt is not None:
            _, prompt_key, prompt_value = self._project(i, prompt)
            scores = query @ prompt_key.transpose(-1, -2) / math.sqrt(self.sizes.head_dim)
            out = out + gate * (scores.softmax(-1) @ prompt_value)
        out = out.transpose(1, 2).flatten(2)
        return out @ self._of(i, "attn.proj.weight").T + self._of(i, "attn.proj.bias")

    def to_transformers(self):
        """Return the same model in transformers."""
        state = {
            "model.embed_tokens.weight": self.weights["transformer.wte.weight"],
            "model.norm.weight": self.weights["transformer.ln_f.weight"],
            "lm_head.weight": self.weights["lm_head.weight"],
        }
        for i in range(self.sizes.layers):
            at = f"model.layers.{i}"
            for kind in ("weight", "bias"):
                # The rows of the projection are its output's last axis.
                parts = self._split(self._of(i, f"attn.qkv.{kind}").movedim(0, -1))
                for name, part in zip("qkv", parts, strict=True):
                    state[f"{at}.self_attn.{name}_proj.{kind}"] = part.movedim(-1, 0).contiguous()
                state[f"{at}.self_attn.o_proj.{kind}"] = self._of(i, f"attn.proj.{kind}")
            state |= {
                f"{at}.mlp.gate_proj.weight": self._of(i, "mlp.fc_1.weight"),
                f"{at}.mlp.up_proj.weight": self._of(i, "mlp.fc_2.weight"),
                f"{at}.mlp.down_proj.weight": self._of(i, "mlp.proj.weight"),
                f"{at}.input_layernorm.weight": self._of(i, "norm_1.weight"),
                f"{at}.post_attention_layernorm.weight": self._of(i, "norm_2.weight"),
            }
        return transformers_llama(self.sizes, state, attention_bias=True)


def transformers_llama(sizes, state, **options):
    """Return a LLaMA of transformers with these weights, in float64."""
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rms_norm_eps=EPS,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        **options,
    )
    model = LlamaForCausalLM(config).double().eval()
    model.load_state_dict(state)
    return model


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def causal_shares(query, key):
    """Return `softmax(query key^T / sqrt(head_dim))` over the tokens up to each query's own."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1)


def rotate_neighbours(x):
    """Turn the pairs (0, 1), (2, 3), ... of the last axis, taken as complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * _turns(x)).flatten(-2)


def rotate_halves(x):
    """Turn the pairs (i, i + half) of the last axis, taken as complex numbers."""
    turned = torch.complex(*x.chunk(2, dim=-1)) * _turns(x)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _turns(x):
    length, head_dim = x.shape[-2:]
    speeds = THETA ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.arange(length).double()[:, None] * speeds
    return torch.polar(torch.ones_like(angles), angles)


class _Draw:
    """Random weights of a size that keeps activations around one."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, scale=None):
        noise = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return noise * (shape[-1] ** -0.5 if scale is None else scale)

    def norm(self, size):
        return 1 + self(size, scale=0.3)

    def gates(self, *shape):
        """Return gates away from zero, of both signs, where the activation makes a difference."""
        size = torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.5
        return size * torch.randn(shape, generator=self.generator).sign().double()
