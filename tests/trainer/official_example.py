"""Text classification with the Trainer, written after the Transformers documentation ("Fine-tuning", "Trainer"), on
made-up sentences and a model from scratch. An unmodified script: it imports nothing of hf_mars."""

import time

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

SUBJECTS, VERDICTS = ("the film", "the book", "this song", "that play"), (("dull", "bad", "weak"), ("good", "fine"))


def make_tokenizer(texts):
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[PAD]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def compute_metrics(eval_pred):
    logits, labels = eval_pred
    return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}


def main():
    (training_args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    rows = [
        {"text": f"{subject} was {word}", "label": label}
        for subject in SUBJECTS
        for label, words in enumerate(VERDICTS)
        for word in words
    ]
    dataset = Dataset.from_list(rows)
    tokenizer = make_tokenizer(dataset["text"])
    tokenized = dataset.map(lambda examples: tokenizer(examples["text"], truncation=True), batched=True)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=2, **sizes))
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=tokenized,
        eval_dataset=tokenized,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer=tokenizer),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        print(f"{type(optimizer).__name__} on {training_args.world_size} processes")
    trainer.accelerator.wait_for_everyone()  # gloo may abort a process whose peers have left,
    time.sleep(0.5)  # or one that leaves while gloo's threads are at work


if __name__ == "__main__":
    main()
