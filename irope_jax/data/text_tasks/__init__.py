"""Questions about long texts, in words, for any tokenizer: generators only. What an answer is worth is `evals`'."""
