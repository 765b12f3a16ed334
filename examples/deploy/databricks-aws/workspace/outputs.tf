output "workspace_url" {
  description = "Address of the workspace: job/ takes it as workspace_url."
  value       = databricks_mws_workspaces.this.workspace_url
}

output "instance_profile_arn" {
  description = "What the nodes use to reach the buckets: job/ takes it as instance_profile_arn."
  value       = aws_iam_instance_profile.nodes.arn
}
