"""What tests share: tiny models, fake searches, commands in processes of their own."""
