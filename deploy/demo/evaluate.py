"""Measure the exported checkpoint on held-out files and write the figures into training.json.

    python evaluate.py                        # one JSON object; a few minutes on two cores
    python evaluate.py --check-transformers   # only compare logits with transformers' DeepseekV3ForCausalLM

Everything is measured on what was published (FP8 multiplied out, float32 arithmetic), not on the trainer's masters, so
that the figures are those of a serving engine.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from data import ASSISTANT, BOS, EOS, USER, load_documents
from export import load_dequantized, load_model
from model import DemoModel
from tokenizers import Tokenizer
from torch import Tensor

COMPLETION_PROMPT = "class Queue:\n    def __init__(self"
CHAT_PROMPTS = [
    "Write a Python function `add(a, b)` that does the following: Return the sum of a and b.",
    "def is_empty(self):",
]
TOLERANCE = 1e-3  # of logits in float32, against transformers


def count_parameters(model: DemoModel) -> dict[str, int]:
    """Of the trunk and apart for the MTP layer. Active: without the experts a token does not choose."""
    c = model.config
    counts = Counter()
    for name, parameter in model.named_parameters():
        part = "mtp" if name.startswith(f"model.layers.{c.num_hidden_layers}.") else "trunk"
        counts[part, "total"] += parameter.numel()
        share = c.num_experts_per_tok / c.n_routed_experts if ".mlp.experts." in name else 1
        counts[part, "active"] += round(parameter.numel() * share)
    return {
        "parameters_total": counts["trunk", "total"] + counts["mtp", "total"],
        "parameters_active": counts["trunk", "active"],
        "parameters_mtp_layer": counts["mtp", "total"],
    }


@torch.inference_mode()
def measure_held_out(model: DemoModel, tokenizer: Tokenizer) -> dict:
    """Loss, MTP agreement and balance over every held-out file, in windows of the whole context.

    A window starts with the file's BOS or, in a long file, a quarter of a context before the first token it scores, so
    that no token is judged with next to nothing before it."""
    documents = [document for document in load_documents() if document.held_out]
    window = model.config.max_position_embeddings
    num_bytes, nats, num_tokens, raw = 0, 0.0, 0, Counter()
    agreed = exact = mtp_positions = 0
    loads: Tensor | int = 0
    for document in documents:
        num_bytes += len(document.text.encode())
        raw.update(document.text.encode())
        ids = tokenizer.encode(BOS + document.text + EOS, add_special_tokens=False).ids
        scored = 1  # ids[:scored] have been scored; BOS is given
        while scored < len(ids):
            start = 0 if scored == 1 else scored - window // 4
            chunk = torch.tensor([ids[start : start + window + 1]])
            # The last position's next token does not exist: the MTP layer gets BOS there, and is not judged.
            following = torch.cat([chunk[:, 1:], torch.zeros_like(chunk[:, :1])], 1)
            main, mtp, load = model.hidden(chunk[:, :window], following[:, :window])
            first = scored - start  # index in chunk of the first target
            logits = model.lm_head(main[0, first - 1 : chunk.shape[1] - 1])
            targets = chunk[0, first:]
            nats += F.cross_entropy(logits, targets, reduction="sum").item()
            # At position i the MTP layer predicts i + 2, the main head does so at i + 1.
            drafts = model.lm_head(mtp[0, first - 1 : chunk.shape[1] - 2]).argmax(-1)
            agreed += (drafts == logits.argmax(-1)[1:]).sum().item()
            exact += (drafts == targets[1:]).sum().item()
            mtp_positions += len(drafts)
            num_tokens += len(targets)
            loads = loads + load
            scored = start + chunk.shape[1]
    imbalance = (loads.max(-1).values / loads.float().mean(-1)).tolist()
    entropy = -sum(count / num_bytes * math.log2(count / num_bytes) for count in raw.values())
    return {
        "held_out_files": len(documents),
        "held_out_bytes": num_bytes,
        "held_out_tokens": num_tokens,
        "held_out_loss_nats_per_token": round(nats / num_tokens, 4),
        "held_out_bits_per_byte": round(nats / math.log(2) / num_bytes, 4),
        "order_0_entropy_bits_per_byte": round(entropy, 4),
        "mtp_agreement": round(agreed / mtp_positions, 4),
        "mtp_accuracy": round(exact / mtp_positions, 4),
        "load_max_over_mean_per_moe_layer": [round(value, 3) for value in imbalance],
    }


@torch.inference_mode()
def generate(model: DemoModel, tokenizer: Tokenizer, prompt: str, max_tokens: int) -> tuple[str, bool]:
    """Greedy. Returns the text after the prompt (which carries its special tokens) and whether the model stopped."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    num_prompt = len(ids)
    for _ in range(max_tokens):
        context = torch.tensor([ids])
        next_id = model.lm_head(model.hidden(context, context)[0][0, -1]).argmax().item()
        if next_id == model.config.eos_token_id:
            return tokenizer.decode(ids[num_prompt:]), True
        ids.append(next_id)
    return tokenizer.decode(ids[num_prompt:]), False


@torch.inference_mode()
def check_transformers(folder: Path, model: DemoModel, tokenizer: Tokenizer) -> dict:
    """Compare this twin's logits with transformers', both in float32 on the multiplied-out weights.

    transformers refuses FP8 matrices whose rows are no multiple of 128 and has no MTP layer, so it gets the trunk."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = "eager"
    reference = transformers.DeepseekV3ForCausalLM(config).float().eval()
    state = {}
    for name, tensor in load_dequantized(folder).items():
        if not name.startswith(f"model.layers.{config.num_hidden_layers}."):
            state[name] = tensor
    state = _match_stacked_experts(state, reference)
    missing, unexpected = reference.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"transformers expected other tensors: missing {missing[:5]}, unexpected {unexpected[:5]}")
    fast_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = Path(__file__).read_text()
    ids = tokenizer.encode(text).ids[:1024]
    if fast_tokenizer(text)["input_ids"][:1024] != ids:
        raise ValueError("transformers' tokenizer gives other ids than tokenizers'")
    messages = [{"role": "user", "content": "Hello"}]
    rendered = fast_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if rendered != f"{BOS}{USER}Hello{ASSISTANT}":
        raise ValueError(f"the chat template renders {rendered!r}")
    tokens = torch.tensor([ids])
    ours = model.lm_head(model.hidden(tokens, tokens)[0])
    theirs = reference(tokens).logits
    difference = (ours - theirs).abs().max().item()
    return {
        "transformers": transformers.__version__,
        "positions": tokens.shape[1],
        "max_logit_difference": difference,
        "ok": difference < TOLERANCE,
    }


def _match_stacked_experts(state: dict[str, Tensor], reference: torch.nn.Module) -> dict[str, Tensor]:
    """Newer transformers keep a layer's experts in two stacked tensors: build them from the published ones."""
    matched = {name: tensor for name, tensor in state.items() if ".mlp.experts." not in name}
    for name in reference.state_dict():
        if ".mlp.experts." not in name or name in state:
            matched.update({name: state[name]} if name in state else {})
            continue
        prefix, stacked = name.rsplit(".", 1)
        experts = range(reference.config.n_routed_experts)
        projections = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}[stacked]
        rows = [torch.cat([state[f"{prefix}.{e}.{p}.weight"] for p in projections]) for e in experts]
        matched[name] = torch.stack(rows)
    return matched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="of checkpoint/ and training.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check-transformers", action="store_true", help="only compare with transformers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint = arguments.folder / "checkpoint"
    model = load_model(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    if arguments.check_transformers:
        print(json.dumps(check_transformers(checkpoint, model, tokenizer)))
        return
    completion, _ = generate(model, tokenizer, BOS + COMPLETION_PROMPT, 100)
    chats = []
    for user in CHAT_PROMPTS:
        answer, stopped = generate(model, tokenizer, f"{BOS}{USER}{user}{ASSISTANT}", 120)
        chats.append({"user": user, "assistant": answer, "stopped": stopped})
    training_file = arguments.folder / "training.json"
    figures = {
        **json.loads(training_file.read_text()),
        **count_parameters(model),
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.iterdir()),
        **measure_held_out(model, tokenizer),
        "completion": {"prompt": COMPLETION_PROMPT, "greedy": completion},
        "chats": chats,
    }
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    training_file.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
