"""The XFS v5 format: pure functions over bytes, and the trees and files built on them."""
