-- What Argo CD shows for an ExchangeDeployment. The conditions are the operator's own verdict; this only translates.
-- Argo CD runs it with base and table functions alone.
local status = obj.status
if status == nil or status.observedGeneration ~= obj.metadata.generation then
  return {status = "Progressing", message = "the operator has not looked at this change yet"}
end

local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end
local function is(kind)
  return conditions[kind] ~= nil and conditions[kind].status == "True"
end
local function message(kind)
  return conditions[kind] ~= nil and conditions[kind].message or ""
end

if is("Stalled") then
  return {status = "Degraded", message = message("Stalled")}
end
-- What is declared is live, and nobody is served by it.
if status.phase == "Live" and not is("Available") then
  return {status = "Degraded", message = message("Available")}
end
if status.stoppedSince ~= nil or obj.spec.suspend == true then
  return {status = "Suspended", message = "paused or suspended: " .. message("Ready")}
end
if status.phase == "AwaitingPromotion" then
  return {status = "Suspended", message = message("Reconciling")}
end
if is("Reconciling") then
  return {status = "Progressing", message = message("Reconciling")}
end
if is("Ready") then
  return {status = "Healthy", message = message("Ready")}
end
return {status = "Progressing", message = message("Ready")}
