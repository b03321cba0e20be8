"""Steps that every example shares: tokenizer, teachers, records, plots and summary."""
