"""What tests share: toy problems with known answers, and ways to run what is tested."""
