"""From files of conversations to the token ids, masks and features that a draft is trained on."""
