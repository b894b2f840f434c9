"""The last lines that a run prints: its result, and a sample of text."""

from transformers import PreTrainedTokenizerBase, set_seed

from hf_mars import MarsTrainer

SAMPLE_TOKENS = 100


def summarize(trainer: MarsTrainer) -> str:
    """The result of a run in one line."""
    evaluations = [entry for entry in trainer.state.log_history if "eval_perplexity" in entry]
    if not evaluations:
        return f"trained {trainer.state.global_step} steps"
    last = evaluations[-1]
    before = ""
    if evaluations[0]["step"] == 0 and trainer.state.global_step > 0:
        before = f"perplexity {evaluations[0]['eval_perplexity']:.2f} before training; "
    after = f"after {last['step']} steps: loss {last['eval_loss']:.4f}, perplexity {last['eval_perplexity']:.2f}"
    accuracy = f", next-token accuracy {last['eval_accuracy']:.4f}" if "eval_accuracy" in last else ""
    return before + after + accuracy


def generate_sample(trainer: MarsTrainer, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt and up to SAMPLE_TOKENS tokens that the model continues it with, drawn with the run's seed."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    if input_ids.shape[1] == 0:
        input_ids = input_ids.new_tensor([[tokenizer.eos_token_id]])
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:  # leave room for at least as many new tokens as the prompt has
        input_ids = input_ids[:, -(positions // 2) :]
    new_tokens = SAMPLE_TOKENS if positions is None else min(SAMPLE_TOKENS, positions - input_ids.shape[1])
    set_seed(trainer.args.seed)
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=input_ids.new_ones(input_ids.shape).to(model.device),
        do_sample=True,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
