"""Low-rank adapters on a Hugging Face model, by a predicate over its parameters; merged into a plain one at the end."""

import toolz
import torch
import transformers

import forgather_fn as ff

config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
ids = torch.arange(64).repeat(64, 1).roll(3, 1)[:, :24] + torch.arange(64)[:, None]
data = ff.batches({"input_ids": ids % 64, "labels": ids % 64}, batch_size=16)


def attention(name: str, tensor: torch.Tensor) -> bool:
    return name.endswith(("q_proj.weight", "v_proj.weight"))


plan = ff.Plan(
    model=ff.lora(lambda: transformers.LlamaForCausalLM(config), attention, rank=4, alpha=8, also="lm_head.weight"),
    loss=ff.losses.causal_lm,
    optimizer=ff.adamw(),
    schedule=1e-2,
)
program = ff.single(plan)
state = program.init(seed=0)
print(state)  # what is trained, and what is frozen and shared
print("before", program.evaluate(state, data))
final = toolz.pipe(program.steps(state, data), ff.until(steps=60), ff.last)
print("after", program.evaluate(final, data))

plain = ff.adapters.merged(program.export(final)).eval()
fresh = transformers.LlamaForCausalLM(config)
fresh.load_state_dict(plain.state_dict())  # of the original class, with no trace of the adapters
logits = program.apply(final, input_ids=ids[:2] % 64).logits
torch.testing.assert_close(fresh.eval()(input_ids=ids[:2] % 64).logits, logits)
