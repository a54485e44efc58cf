"""What a replica learns from: files of documents, conversations, mixtures, packed rows."""
